#include "nn/transition.h"

#include <limits>

namespace gateloop::nn {

void scale_gradient(const torch::Tensor& z, double fraction) {
  if (fraction == 1.0 || !z.requires_grad()) return;
  z.register_hook([fraction](const torch::Tensor& grad) { return grad * fraction; });
}

torch::Tensor drop_imaginary(const torch::Tensor& z) {
  const auto keep_real = at::arange(1, -1, -1, z.options());  // (1, 0)
  return (z.unflatten(-1, {-1, 2}) * keep_real).flatten(-2);
}

namespace {

/// z in float32 at least, and a gate of two numbers' as (..., C, 2).
torch::Tensor raw_numbers(const torch::Tensor& z, model::Gate gate) {
  const auto wide = z.scalar_type() == torch::kDouble ? z : z.to(torch::kFloat);
  return gate == model::Gate::kSigmoid ? wide : wide.unflatten(-1, {-1, 2});
}

/// σ of which |a| is: (..., C).
torch::Tensor logit_of(const torch::Tensor& raw, model::Gate gate) {
  if (gate == model::Gate::kSigmoid) return raw;
  return gate == model::Gate::kPolar ? at::view_as_complex(raw).abs() : raw.select(-1, 0);
}

}  // namespace

torch::Tensor transition_of(const torch::Tensor& z, model::Gate gate) {
  const auto raw = raw_numbers(z, gate);
  auto modulus = logit_of(raw, gate).sigmoid();
  if (gate == model::Gate::kSigmoid) return modulus;
  const bool polar = gate == model::Gate::kPolar;
  return at::polar(modulus, polar ? at::view_as_complex(raw).angle() : raw.select(-1, 1));
}

torch::Tensor input_scale(const torch::Tensor& z, model::Gate gate,
                          model::NormalizeInput normalize) {
  auto rest = (-logit_of(raw_numbers(z, gate), gate)).sigmoid();  // 1 - |a|
  if (normalize == model::NormalizeInput::kMean) return rest;
  // The root's gradient at zero is infinite.
  return (rest * (2 - rest)).clamp_min(std::numeric_limits<float>::min()).sqrt();
}

}  // namespace gateloop::nn
