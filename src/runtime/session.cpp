#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

#include "gateloop/runtime.h"
#include "model/digest.h"
#include "model/machine.h"
#include "runtime/many_rows.h"
#include "runtime/one_row.h"
#include "runtime/pool.h"

namespace gateloop::runtime {
namespace {

constexpr int kMostThreads = 1024;

[[noreturn]] void refuse(const std::string& function, const std::string& problem) {
  throw std::invalid_argument(function + ": " + problem);
}

int checked_threads(int threads) {
  if (threads < 0 || threads > kMostThreads)
    refuse("Session", "threads must be in [0, " + std::to_string(kMostThreads) + "], got " +
                          std::to_string(threads));
  return threads == 0 ? std::min(kMostThreads, model::usable_cpus()) : threads;
}

/// -ln p(id) under softmax(logits), in double: a sum over a long text must not lose the small
/// terms.
double surprise_of(std::span<const float> logits, std::size_t id) {
  const auto most = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - most);
  return most + std::log(sum) - static_cast<double>(logits[id]);
}

void check_batch(const char* function, std::int64_t batch, std::int64_t of_state) {
  if (of_state != 0 && of_state != batch)
    refuse(function, "the state is of " + std::to_string(of_state) + " sequences, got " +
                         std::to_string(batch));
}

void check_range(const std::string& function, const std::string& argument,
                 std::span<const std::int64_t> tokens, std::int64_t num_tokens) {
  for (const std::int64_t token : tokens) {
    if (token < 0 || token >= num_tokens)
      refuse(function, argument + " must be in [0, " + std::to_string(num_tokens) + "), got " +
                           std::to_string(token));
  }
}

void check_room(const char* function, std::span<const std::int64_t> ids, std::int64_t num_tokens,
                std::span<const float> logits) {
  const std::size_t size = ids.size() * static_cast<std::size_t>(num_tokens);
  if (logits.size() != size)
    refuse(function, "logits must have room for " + std::to_string(size) + " numbers, got " +
                         std::to_string(logits.size()));
}

}  // namespace

Model::Model(const std::filesystem::path& dir, const OpenOptions& options)
    : network_(std::make_shared<Network>(WeightSet(model::open_model(dir, options.weights)),
                                         options.format)) {}
Model::Model(const model::ModelSpec& spec, const std::vector<StoredWeight>& weights,
             std::shared_ptr<const void> owner, Format format)
    : network_(std::make_shared<Network>(WeightSet(spec, weights, std::move(owner)), format)) {}

const model::ModelSpec& Model::spec() const { return network_->spec(); }
const std::optional<model::ModelOptions>& Model::options() const {
  return network_->weights().options();
}
std::vector<StoredWeight> Model::weights() const { return network_->weights().weights(); }
std::string Model::checksum() const {
  return model::hexadecimal(network_->weights().full_digest());
}
std::int64_t Model::weight_bytes() const { return network_->weight_bytes(); }
std::int64_t Model::copied_bytes() const { return network_->copied_bytes(); }

class Session::Impl {
 public:
  Impl(Model model, std::shared_ptr<const Network> network, const SessionOptions& options)
      : model(std::move(model)),
        network_(std::move(network)),
        chunk_(options.chunk),
        pool_(checked_threads(options.threads)),
        executor_(pool_.executor()),
        one_row_(*network_, pool_.threads()),
        many_rows_(*network_) {
    if (chunk_ < 1) refuse("Session", "chunk must be positive, got " + std::to_string(chunk_));
    const Widths& widths = network_->widths();
    ones_.assign(static_cast<std::size_t>(std::max(network_->dim(), widths.mixed)), 1.0f);
  }

  /// Checks ids (B, T) and the state; what there is to read.
  Runs admit(const char* function, std::span<const std::int64_t> ids, std::int64_t batch) {
    check_ids(function, ids, batch, state.batch(), network_->num_tokens());
    begin(batch);
    return {.batch = batch, .time = std::ssize(ids) / batch};
  }
  /// The same for packed sequences.
  Runs admit(const char* function, std::span<const std::int64_t> ids,
             std::span<const std::int64_t> cu_seqlens) {
    check_cu_seqlens(function, cu_seqlens, std::ssize(ids));
    const std::int64_t batch = std::ssize(cu_seqlens) - 1;
    check_batch(function, batch, state.batch());
    check_range(function, "ids", ids, network_->num_tokens());
    begin(batch);
    return {.batch = batch, .starts = cu_seqlens};
  }

  /// Logits of every token, in the order of ids.
  void read_all(std::span<const std::int64_t> ids, const Runs& whole, float* logits) {
    read(ids, whole, /*last_only=*/false, logits);
  }
  /// (B, num_tokens) of each sequence's last token.
  std::span<const float> read_last(std::span<const std::int64_t> ids, const Runs& whole) {
    logits_.resize(static_cast<std::size_t>(whole.batch * network_->num_tokens()));
    read(ids, whole, /*last_only=*/true, logits_.data());
    return logits_;
  }

  std::span<const std::int64_t> widened(std::span<const std::int32_t> ids) {
    wide_ids_.assign(ids.begin(), ids.end());
    return wide_ids_;
  }

  const Network& network() const { return *network_; }
  int threads() const { return pool_.threads(); }

  const Model model;
  StateData state;

 private:
  void begin(std::int64_t batch) {
    if (state.batch() != 0) return;
    check_memory(batch);
    state = initial_state(network_->spec(), network_->digest(), batch);
  }
  /// The system hands out memory that it has not, and ends processes that write to it.
  void check_memory(std::int64_t batch) const {
    constexpr double kAlwaysThere = 1 << 28;
    const auto each = static_cast<double>(model::state_size(network_->spec()).fixed);
    const double bytes = static_cast<double>(batch) * each;
    if (bytes < kAlwaysThere) return;
    const auto available = static_cast<double>(model::available_memory());
    if (available == 0 || bytes <= available) return;
    char text[120];
    std::snprintf(text, sizeof text,
                  "Session: states of %lld sequences take %.3g GB, %.3g are left",
                  static_cast<long long>(batch), bytes / 1e9, available / 1e9);
    throw std::runtime_error(text);
  }
  void read(std::span<const std::int64_t> ids, const Runs& whole, bool last_only, float* logits) {
    const std::int64_t width = network_->num_tokens();
    ManyRows::Call call{.stride = whole.time,
                        .runs = {.batch = whole.batch},
                        .last_only = last_only,
                        .logits_stride = width * (last_only || whole.packed() ? 1 : whole.time)};
    std::vector<std::int64_t> starts(whole.starts.size());
    const std::int64_t time = whole.packed() ? whole.rows() : whole.time;
    const std::int64_t most =
        whole.packed() ? chunk_ : std::max<std::int64_t>(1, chunk_ / whole.batch);
    for (std::int64_t first = 0; first < time; first += most) {
      const std::int64_t last = std::min(time, first + most);
      call.tokens = ids.data() + first;
      call.logits = last_only ? logits : logits + first * width;
      if (whole.packed()) {
        for (std::size_t i = 0; i < starts.size(); ++i)
          starts[i] = std::clamp(whole.starts[i], first, last) - first;
        call.runs.starts = starts;
      } else {
        call.runs.time = last - first;
      }
      advance(call);
    }
  }
  void advance(const ManyRows::Call& call) {
    try {
      reserve_steps(network_->spec(), state, call.runs);
      if (call.runs.batch == 1 && call.runs.rows() == 1) {
        one_row_.step(call.token(0), state, ones_.data(), executor_, call.logits);
      } else {
        many_rows_.run(call, state, ones_.data(), executor_);
      }
    } catch (...) {  // some layers may have read the tokens
      state = {};
      throw;
    }
    for (std::int64_t b = 0; b < call.runs.batch; ++b)
      state.positions[static_cast<std::size_t>(b)] += call.runs.steps(b);
  }

  std::shared_ptr<const Network> network_;
  std::int64_t chunk_;
  Pool pool_;
  recurrence::Executor executor_;
  OneRow one_row_;
  ManyRows many_rows_;
  std::vector<float> ones_, logits_;
  std::vector<std::int64_t> wide_ids_;
};

Reader::~Reader() = default;

void Reader::check_ids(const char* function, std::span<const std::int64_t> ids, std::int64_t batch,
                       std::int64_t of_state, std::int64_t num_tokens) {
  const auto count = static_cast<std::int64_t>(ids.size());
  if (batch < 1) refuse(function, "batch must be positive, got " + std::to_string(batch));
  if (count == 0 || count % batch != 0)
    refuse(function, "ids must be (B, T) with B = " + std::to_string(batch) + " and T >= 1, got " +
                         std::to_string(count) + " ids");
  check_batch(function, batch, of_state);
  check_range(function, "ids", ids, num_tokens);
}

void Reader::check_next(std::span<const std::int64_t> next, std::span<const std::int64_t> ids,
                        std::int64_t num_tokens) {
  if (next.size() != ids.size())
    refuse("surprise", "next must be as many tokens as ids, " + std::to_string(ids.size()) +
                           ", got " + std::to_string(next.size()));
  check_range("surprise", "next", next, num_tokens);
}

Session::Session(Model model, const SessionOptions& options) {
  std::shared_ptr<const Network> network = model.network_;
  impl_ = std::make_unique<Impl>(std::move(model), std::move(network), options);
}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

std::span<const float> Session::prefill(std::span<const std::int64_t> ids, std::int64_t batch) {
  return impl_->read_last(ids, impl_->admit("prefill", ids, batch));
}
std::span<const float> Session::prefill(std::span<const std::int32_t> ids, std::int64_t batch) {
  return prefill(impl_->widened(ids), batch);
}
std::span<const float> Session::step(std::span<const std::int64_t> ids) {
  const std::int64_t batch = std::max<std::int64_t>(1, std::ssize(ids));
  return impl_->read_last(ids, impl_->admit("step", ids, batch));
}
std::span<const float> Session::step(std::span<const std::int32_t> ids) {
  return step(impl_->widened(ids));
}

std::span<const float> Session::prefill_packed(std::span<const std::int64_t> ids,
                                               std::span<const std::int64_t> cu_seqlens) {
  return impl_->read_last(ids, impl_->admit("prefill_packed", ids, cu_seqlens));
}

std::vector<float> Session::read_all(std::span<const std::int64_t> ids, std::int64_t batch) {
  std::vector<float> logits(ids.size() * static_cast<std::size_t>(impl_->network().num_tokens()));
  read_all(ids, batch, logits);
  return logits;
}

void Session::read_all(std::span<const std::int64_t> ids, std::int64_t batch,
                       std::span<float> logits) {
  check_room("read_all", ids, impl_->network().num_tokens(), logits);
  impl_->read_all(ids, impl_->admit("read_all", ids, batch), logits.data());
}

void Session::read_all_packed(std::span<const std::int64_t> ids,
                              std::span<const std::int64_t> cu_seqlens, std::span<float> logits) {
  check_room("read_all_packed", ids, impl_->network().num_tokens(), logits);
  impl_->read_all(ids, impl_->admit("read_all_packed", ids, cu_seqlens), logits.data());
}

double Session::surprise(std::span<const std::int64_t> ids, std::span<const std::int64_t> next,
                         std::int64_t batch) {
  const auto width = static_cast<std::size_t>(spec().num_tokens);
  check_next(next, ids, spec().num_tokens);
  const std::vector<float> logits = read_all(ids, batch);
  double nats = 0;
  for (std::size_t i = 0; i < next.size(); ++i)
    nats +=
        surprise_of(std::span(logits).subspan(i * width, width), static_cast<std::size_t>(next[i]));
  return nats;
}

void Session::restart() { set_state({}); }
const model::ModelSpec& Session::spec() const { return impl_->network().spec(); }
std::int64_t Session::position() const { return impl_->state.longest(); }
std::int64_t Session::state_bytes() const { return impl_->state.bytes(); }
const Model& Session::model() const { return impl_->model; }
int Session::threads() const { return impl_->threads(); }

State Session::state() const {
  State state;
  *state.data_ = impl_->state;
  return state;
}

State Session::take_state() {
  State state;
  *state.data_ = std::exchange(impl_->state, {});
  return state;
}

void Session::set_state(State state) {
  const Network& network = impl_->network();
  const std::string problem = state_problem(network.spec(), network.digest(), state.data());
  if (!problem.empty()) refuse("set_state", "not a state of this model: " + problem);
  impl_->state = state.data_ ? std::move(*state.data_) : StateData();
}

}  // namespace gateloop::runtime
