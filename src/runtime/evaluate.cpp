#include <algorithm>
#include <cmath>
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

void check(std::span<const std::uint8_t> text, std::int64_t num_tokens,
           const EvaluateOptions& options) {
  if (options.window < 0)
    refuse("window must be at least 0, got " + std::to_string(options.window));
  if (options.bytes_at_once < 1)
    refuse("bytes_at_once must be positive, got " + std::to_string(options.bytes_at_once));
  if (text.size() < 2)
    refuse("text must have at least 2 bytes, one to read and one to predict, got " +
           std::to_string(text.size()));
  const std::int64_t largest = *std::max_element(text.begin(), text.end());
  if (largest >= num_tokens)
    refuse("bytes of the text must be in [0, " + std::to_string(num_tokens) + "), got " +
           std::to_string(largest));
}

/// -ln p(id) under softmax(logits), in double: a sum over a long text must not lose the small
/// terms.
double surprise(std::span<const float> logits, std::int64_t id) {
  const auto most = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - most);
  return most + std::log(sum) - static_cast<double>(logits[static_cast<std::size_t>(id)]);
}

/// The sum of the surprise of the bytes after text[0 .. rows · length), read as `rows` sequences.
double read(Session& session, const std::uint8_t* text, std::int64_t rows, std::int64_t length) {
  const std::vector<std::int64_t> ids(text, text + rows * length);
  const std::vector<float> logits = session.read_all(ids, rows);
  const auto width = static_cast<std::size_t>(session.model().spec().num_tokens);
  double nats = 0;
  for (std::size_t i = 0; i < ids.size(); ++i)
    nats += surprise(std::span(logits).subspan(i * width, width), text[i + 1]);
  return nats;
}

}  // namespace

double Score::bits_per_byte() const {
  return nats / (static_cast<double>(bytes) * std::numbers::ln2);
}

Score evaluate(Session& session, std::span<const std::uint8_t> text,
               const EvaluateOptions& options) {
  check(text, session.model().spec().num_tokens, options);
  const std::int64_t total = std::ssize(text) - 1, window = options.window;
  Score score;
  session.set_state({});
  while (score.bytes < total) {
    const std::int64_t left = total - score.bytes;
    std::int64_t rows = 1, length = std::min(options.bytes_at_once, left);
    if (window > 0) {
      session.set_state({});
      length = std::min(window, left);  // shorter: the last window, on its own
      rows = std::clamp(options.bytes_at_once / length, std::int64_t{1}, left / length);
    }
    score.nats += read(session, text.data() + score.bytes, rows, length);
    score.bytes += rows * length;
    if (options.progress) options.progress(score.bytes, total);
  }
  return score;
}

}  // namespace gateloop::runtime
