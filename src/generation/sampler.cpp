#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "gateloop/generation.h"

namespace gateloop::generation {
namespace {

/// Below this temperature rounding would draw the token: logits of about 10 carry float32 errors of
/// about 1e-6, which dividing by it raises to the size of the noise.
constexpr double kGreedyBelow = 1e-6;

/// Standard Gumbel noise, -ln(-ln u): -ln u of a uniform u is exponential.
/// exponential_ draws from the open interval (0, inf), so the noise is finite.
torch::Tensor gumbel_noise_like(const torch::Tensor& values, at::Generator& generator) {
  return torch::empty_like(values).exponential_(1.0, generator).log_().neg_();
}

/// The largest logit of every row, (B) float32.
void check_finite(const torch::Tensor& largest) {
  const auto rows = largest.accessor<float, 1>();
  for (std::int64_t row = 0; row < rows.size(0); ++row) {
    if (!std::isfinite(rows[row]))
      throw std::runtime_error("the model's logits are not finite; its weights are damaged");
  }
}

}  // namespace

std::int64_t top_k(double threshold, std::int64_t num_tokens) {
  if (!(threshold >= 0 && threshold < 1))
    throw std::invalid_argument("top-k threshold must be at least 0 and below 1, not " +
                                std::to_string(threshold));
  return static_cast<std::int64_t>(std::ceil((1 - threshold) * static_cast<double>(num_tokens)));
}

Sampler::Sampler(SamplingOptions options, std::uint64_t seed)
    : options_(options), generator_(at::make_generator<at::CPUGeneratorImpl>(seed)) {
  top_k(options.top_k_threshold, 1);  // throws outside the range
  if (!(options.temperature >= 0 && std::isfinite(options.temperature)))
    throw std::invalid_argument("temperature must be finite and at least 0, not " +
                                std::to_string(options.temperature));
}

torch::Tensor Sampler::operator()(const torch::Tensor& logits) {
  const torch::NoGradGuard no_grad;
  const auto scores = logits.to(torch::kCPU, torch::kFloat32);
  const bool greedy = options_.temperature < kGreedyBelow;
  if (greedy) {
    const auto [values, tokens] = scores.max(-1);
    check_finite(values);
    return tokens;
  }
  // Sorted: the largest first.
  auto [values, tokens] = scores.topk(top_k(options_.top_k_threshold, scores.size(-1)), -1);
  check_finite(values.select(-1, 0));
  values.div_(options_.temperature).add_(gumbel_noise_like(values, generator_));
  return tokens.gather(-1, values.argmax(-1, /*keepdim=*/true)).squeeze(-1);
}

}  // namespace gateloop::generation
