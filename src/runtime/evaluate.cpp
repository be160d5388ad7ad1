#include <algorithm>
#include <numbers>
#include <stdexcept>
#include <string>
#include <vector>

#include "gateloop/runtime.h"

namespace gateloop::runtime {
namespace {

[[noreturn]] void refuse(const std::string& problem) {
  throw std::invalid_argument("evaluate: " + problem);
}

void check_cuts(std::span<const std::uint8_t> text, const EvaluateOptions& options) {
  if (options.window < 0)
    refuse("window must be at least 0, got " + std::to_string(options.window));
  if (text.size() < 2)
    refuse("text must have at least 2 bytes, one to read and one to predict, got " +
           std::to_string(text.size()));
}

void check(std::span<const std::uint8_t> text, std::int64_t num_tokens,
           const EvaluateOptions& options) {
  check_cuts(text, options);
  if (options.bytes_at_once < 1)
    refuse("bytes_at_once must be positive, got " + std::to_string(options.bytes_at_once));
  const std::int64_t largest = *std::max_element(text.begin(), text.end());
  if (largest >= num_tokens)
    refuse("bytes of the text must be in [0, " + std::to_string(num_tokens) + "), got " +
           std::to_string(largest));
}

/// The sum of the surprise of the bytes after those at `begin` .. `begin` + `length` - 1 of each
/// stretch.
double read(Reader& reader, std::span<const std::uint8_t> text, std::span<const Stretch> stretches,
            std::int64_t begin, std::int64_t length) {
  std::vector<std::int64_t> ids, next;
  for (const Stretch& stretch : stretches) {
    const auto first = text.begin() + stretch.start + begin;
    ids.insert(ids.end(), first, first + length);
    next.insert(next.end(), first + 1, first + length + 1);
  }
  return reader.surprise(ids, next, std::ssize(stretches));
}

}  // namespace

double Score::bits_per_byte() const {
  return nats / (static_cast<double>(bytes) * std::numbers::ln2);
}

std::vector<Stretch> stretches(std::span<const std::uint8_t> text, const EvaluateOptions& options) {
  check_cuts(text, options);
  const std::int64_t total = std::ssize(text) - 1;
  const std::int64_t window = options.window == 0 ? total : options.window;
  std::vector<Stretch> cut;
  for (std::int64_t start = 0; start < total;) {
    std::int64_t end = std::min(total, (start / window + 1) * window);
    if (options.separator) {
      end = std::find(text.begin() + start + 1, text.begin() + end, *options.separator) -
            text.begin();
    }
    cut.push_back({start, end - start});
    start = end;
  }
  return cut;
}

Score evaluate(Reader& reader, std::span<const std::uint8_t> text, const EvaluateOptions& options) {
  return evaluate_stretches(reader, text, stretches(text, options), options);
}

Score evaluate_stretches(Reader& reader, std::span<const std::uint8_t> text,
                         std::vector<Stretch> stretches, const EvaluateOptions& options) {
  check(text, reader.spec().num_tokens, options);
  std::int64_t total = 0;
  for (const Stretch& stretch : stretches) {
    if (stretch.start < 0 || stretch.length < 1 ||
        stretch.length > std::ssize(text) - 1 - stretch.start)
      refuse("stretches must lie in a text of " + std::to_string(text.size()) + " bytes, got " +
             std::to_string(stretch.length) + " bytes from " + std::to_string(stretch.start));
    total += stretch.length;
  }
  // Those of one length are read side by side.
  std::stable_sort(stretches.begin(), stretches.end(),
                   [](const Stretch& a, const Stretch& b) { return a.length > b.length; });
  std::span<const Stretch> left = stretches;
  Score score;
  while (!left.empty()) {
    const std::int64_t length = left.front().length;
    const auto other = std::find_if(
        left.begin(), left.end(), [&](const Stretch& stretch) { return stretch.length != length; });
    // Each row has a state, which may be larger than what is read.
    constexpr std::int64_t kMostRows = 64;
    const std::int64_t most =
        std::clamp<std::int64_t>(options.bytes_at_once / length, 1, kMostRows);
    const auto rows =
        left.first(static_cast<std::size_t>(std::min<std::int64_t>(most, other - left.begin())));
    reader.restart();
    for (std::int64_t begin = 0; begin < length;) {
      const std::int64_t bytes = std::min(length - begin, options.bytes_at_once);
      score.nats += read(reader, text, rows, begin, bytes);
      score.bytes += bytes * std::ssize(rows);
      begin += bytes;
      if (options.progress) options.progress(score.bytes, total);
    }
    left = left.subspan(rows.size());
  }
  return score;
}

}  // namespace gateloop::runtime
