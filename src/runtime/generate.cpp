#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "gateloop/generation.h"

namespace gateloop::generation {

std::vector<std::int64_t> encode_prompt(std::string_view text) {
  if (text.empty()) text = "\n";
  std::vector<std::int64_t> ids;
  for (const char byte : text) ids.push_back(static_cast<unsigned char>(byte));
  return ids;
}

std::vector<std::int64_t> generate(
    runtime::Reader& reader, std::span<const std::int64_t> prompt, std::int64_t batch,
    const GenerateOptions& options,
    const std::function<bool(std::span<const std::int64_t> tokens)>& on_tokens) {
  if (options.length < 0)
    throw std::invalid_argument("generate: length must be at least 0, got " +
                                std::to_string(options.length));
  Sampler sampler(options.sampling, options.seed);
  std::vector<std::vector<std::int64_t>> drawn;
  auto logits = reader.prefill(prompt, batch);
  sampler.read(prompt, batch);
  while (std::ssize(drawn) < options.length && !sampler.ended()) {
    drawn.push_back(sampler.draw(logits, batch));
    if (on_tokens && !on_tokens(drawn.back())) break;
    if (std::ssize(drawn) == options.length || sampler.ended()) break;
    // A sequence that has ended goes on with any token: nothing reads its logits.
    std::vector<std::int64_t> next = drawn.back();
    std::replace(next.begin(), next.end(), Sampler::kEnded, std::int64_t{0});
    logits = reader.prefill(next, batch);
  }
  std::vector<std::int64_t> tokens;
  for (std::size_t b = 0; b < static_cast<std::size_t>(batch); ++b) {
    for (const auto& step : drawn) tokens.push_back(step[b]);
  }
  return tokens;
}

}  // namespace gateloop::generation
