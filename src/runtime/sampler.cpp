#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/generation.h"
#include "model/number_text.h"
#include "runtime/rows.h"

namespace gateloop::generation {
namespace {

/// Below this temperature rounding would draw the token: logits of about 10 carry float32 errors of
/// about 1e-6.
constexpr double kGreedyBelow = 1e-6;

void expect(bool fits, const char* option, const char* expected, double got) {
  if (!fits)
    throw std::invalid_argument(std::string("Sampler: ") + option + " must be " + expected +
                                ", got " + model::number_text(got));
}

void check(const SamplingOptions& o) {
  expect(std::isfinite(o.repetition_penalty) && o.repetition_penalty >= 1, "repetition_penalty",
         "finite and at least 1", o.repetition_penalty);
  expect(std::isfinite(o.temperature) && o.temperature >= 0, "temperature", "finite and at least 0",
         o.temperature);
  expect(o.filter_thres >= 0 && o.filter_thres <= 1, "filter_thres", "in [0, 1]", o.filter_thres);
  expect(o.top_k >= 0, "top_k", "at least 0", static_cast<double>(o.top_k));
  expect(o.top_p > 0 && o.top_p <= 1, "top_p", "in (0, 1]", o.top_p);
  expect(o.min_p >= 0 && o.min_p <= 1, "min_p", "in [0, 1]", o.min_p);
  for (const auto& stop : o.stop) expect(!stop.empty(), "stop", "sequences of tokens", 0);
}

struct Candidate {
  double logit;
  std::int64_t token;
};

/// Of equal logits the smaller token comes first, so that the order is one.
bool is_likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

/// A bit for each token up to the largest that was read: at most 256 MiB a sequence.
constexpr std::int64_t kLargestToken = (std::int64_t{1} << 31) - 1;

/// What a sampler keeps of one sequence.
struct History {
  std::vector<bool> seen;          ///< by token; only with a repetition penalty
  std::vector<std::int64_t> tail;  ///< as long as the longest stop; only drawn tokens
  bool ended = false;
};

}  // namespace

class Sampler::Impl {
 public:
  Impl(SamplingOptions options, std::uint64_t seed) : options_(std::move(options)), random_(seed) {
    check(options_);
    for (const auto& stop : options_.stop) longest_stop_ = std::max(longest_stop_, stop.size());
  }

  void read(std::span<const std::int64_t> ids, std::int64_t batch) {
    check_batch("read", batch);
    const auto rows = static_cast<std::size_t>(batch);
    if (ids.size() % rows != 0)
      throw std::invalid_argument(
          "Sampler::read: ids must be (B, T) with B = " + std::to_string(batch) + ", got " +
          std::to_string(ids.size()) + " ids");
    check_tokens(ids);
    histories_.resize(rows);
    const auto length = ids.size() / rows;
    for (std::size_t b = 0; b < rows; ++b)
      note_read(histories_[b], ids.subspan(b * length, length));
  }
  void read_packed(std::span<const std::int64_t> ids, std::span<const std::int64_t> cu_seqlens) {
    runtime::check_cu_seqlens("Sampler::read_packed", cu_seqlens, std::ssize(ids));
    check_batch("read_packed", std::ssize(cu_seqlens) - 1);
    check_tokens(ids);
    histories_.resize(cu_seqlens.size() - 1);
    for (std::size_t b = 0; b < histories_.size(); ++b) {
      const auto first = static_cast<std::size_t>(cu_seqlens[b]);
      const auto end = static_cast<std::size_t>(cu_seqlens[b + 1]);
      note_read(histories_[b], ids.subspan(first, end - first));
    }
  }

  std::vector<std::int64_t> draw(std::span<const float> logits, std::int64_t batch) {
    check_batch("draw", batch);
    const auto width = logits.size() / static_cast<std::size_t>(batch);
    if (width == 0 || logits.size() % static_cast<std::size_t>(batch) != 0)
      throw std::invalid_argument(
          "Sampler: logits must be (B, num_tokens) with B = " + std::to_string(batch) + ", got " +
          std::to_string(logits.size()) + " numbers");
    histories_.resize(static_cast<std::size_t>(batch));
    std::vector<std::int64_t> tokens;
    for (std::size_t b = 0; b < histories_.size(); ++b) {
      History& history = histories_[b];
      if (history.ended) {
        tokens.push_back(kEnded);
        continue;
      }
      const std::int64_t token = draw_one(logits.subspan(b * width, width), history);
      tokens.push_back(token);
      note_drawn(history, token);
    }
    return tokens;
  }

  bool ended() const {
    return !histories_.empty() && std::all_of(histories_.begin(), histories_.end(),
                                              [](const History& h) { return h.ended; });
  }

 private:
  void check_batch(const char* function, std::int64_t batch) const {
    if (batch < 1 || (!histories_.empty() && std::ssize(histories_) != batch))
      throw std::invalid_argument(
          std::string("Sampler::") + function + ": batch must be " +
          (histories_.empty() ? "positive" : std::to_string(histories_.size())) + ", got " +
          std::to_string(batch));
  }

  static void check_tokens(std::span<const std::int64_t> ids) {
    for (const std::int64_t id : ids) {
      if (id < 0 || id > kLargestToken)
        throw std::invalid_argument("Sampler::read: ids must be in [0, " +
                                    std::to_string(kLargestToken) + "], got " + std::to_string(id));
    }
  }

  void note_read(History& history, std::span<const std::int64_t> ids) const {
    if (options_.repetition_penalty == 1) return;
    for (const std::int64_t id : ids) note_seen(history, id);
  }

  static void note_seen(History& history, std::int64_t token) {
    const auto index = static_cast<std::size_t>(token);
    if (index >= history.seen.size()) history.seen.resize(index + 1);
    history.seen[index] = true;
  }

  void note_drawn(History& history, std::int64_t token) {
    if (options_.repetition_penalty != 1) note_seen(history, token);
    if (longest_stop_ == 0) return;
    auto& tail = history.tail;
    if (tail.size() == longest_stop_) tail.erase(tail.begin());
    tail.push_back(token);
    for (const auto& stop : options_.stop) {
      if (stop.size() <= tail.size() && std::equal(stop.rbegin(), stop.rend(), tail.rbegin()))
        history.ended = true;
    }
  }

  std::int64_t draw_one(std::span<const float> logits, const History& history) {
    candidates_.clear();
    for (std::size_t i = 0; i < logits.size(); ++i) {
      auto logit = static_cast<double>(logits[i]);
      if (i < history.seen.size() && history.seen[i])
        logit =
            logit > 0 ? logit / options_.repetition_penalty : logit * options_.repetition_penalty;
      candidates_.push_back({logit, static_cast<std::int64_t>(i)});
    }
    // NaN has no place in an order: looked for first.
    for (const float logit : logits) {
      if (std::isnan(logit)) fail_not_finite();
    }
    const bool greedy = options_.temperature < kGreedyBelow;
    const auto size = std::ssize(candidates_);
    std::int64_t keep = greedy ? 1 : kept_tokens(options_.filter_thres, size);
    if (options_.top_k > 0) keep = std::min(keep, options_.top_k);
    std::partial_sort(candidates_.begin(), candidates_.begin() + keep, candidates_.end(),
                      is_likelier);
    candidates_.resize(static_cast<std::size_t>(keep));
    const double most = candidates_.front().logit;
    if (!std::isfinite(most)) fail_not_finite();
    if (keep == 1) return candidates_.front().token;

    weights_.clear();
    double sum = 0;
    for (const Candidate& candidate : candidates_) {
      // Less the largest, so that a small temperature overflows nothing.
      weights_.push_back(std::exp((candidate.logit - most) / options_.temperature));
      sum += weights_.back();
    }
    double kept = 0;
    std::size_t count = 0;
    while (count < weights_.size() && weights_[count] >= options_.min_p &&
           (count == 0 || kept < options_.top_p * sum))
      kept += weights_[count++];
    // Uniform in [0, kept) with 53 bits.
    double left = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
    for (std::size_t i = 0; i + 1 < count; ++i) {
      if (left < weights_[i]) return candidates_[i].token;
      left -= weights_[i];
    }
    return candidates_[count - 1].token;
  }

  [[noreturn]] static void fail_not_finite() {
    throw std::runtime_error("the model's logits are not finite; its weights are damaged");
  }

  SamplingOptions options_;
  std::mt19937_64 random_;  // whose numbers the C++ standard fixes
  std::size_t longest_stop_ = 0;
  std::vector<History> histories_;
  std::vector<Candidate> candidates_;
  std::vector<double> weights_;
};

Sampler::Sampler(SamplingOptions options, std::uint64_t seed)
    : impl_(std::make_unique<Impl>(std::move(options), seed)) {}
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;
Sampler::~Sampler() = default;

void Sampler::read(std::span<const std::int64_t> ids, std::int64_t batch) {
  impl_->read(ids, batch);
}
void Sampler::read_packed(std::span<const std::int64_t> ids,
                          std::span<const std::int64_t> cu_seqlens) {
  impl_->read_packed(ids, cu_seqlens);
}
std::vector<std::int64_t> Sampler::draw(std::span<const float> logits, std::int64_t batch) {
  return impl_->draw(logits, batch);
}
bool Sampler::ended() const { return impl_->ended(); }

std::int64_t kept_tokens(double filter_thres, std::int64_t num_tokens) {
  expect(filter_thres >= 0 && filter_thres <= 1, "filter_thres", "in [0, 1]", filter_thres);
  const double kept = std::ceil((1 - filter_thres) * static_cast<double>(num_tokens));
  return std::clamp(static_cast<std::int64_t>(kept), std::int64_t{1}, num_tokens);
}

}  // namespace gateloop::generation
