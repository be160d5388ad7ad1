#include "nn/rotary_embedding.h"

namespace gateloop::nn {
namespace {

torch::Dtype at_least_float32(torch::Dtype dtype) {
  return at::promote_types(dtype, torch::kFloat);
}

}  // namespace

RotaryEmbedding::RotaryEmbedding(std::int64_t dim_head) {
  const auto exponent = at::arange(0, dim_head, 2, torch::kFloat) / dim_head;
  freqs_ = register_parameter("freqs", at::pow(10000, exponent).reciprocal(),
                              /*requires_grad=*/false);
}

void RotaryEmbedding::to(torch::Dtype dtype, bool non_blocking) {
  Module::to(at_least_float32(dtype), non_blocking);
}

void RotaryEmbedding::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  Module::to(device, at_least_float32(dtype), non_blocking);
}

RotaryEmbedding::Angles RotaryEmbedding::angles(std::int64_t first, std::int64_t time) const {
  const auto positions = at::arange(first, first + time, freqs_.options().dtype(torch::kLong));
  return angles(positions);
}

RotaryEmbedding::Angles RotaryEmbedding::angles(const torch::Tensor& positions) const {
  const auto angle = positions.unsqueeze(-1).unsqueeze(-1) * freqs_;
  return {angle.cos(), angle.sin()};
}

torch::Tensor RotaryEmbedding::rotate(const torch::Tensor& t, const Angles& angles) {
  const auto pair = t.unflatten(-1, {-1, 2}).unbind(-1);
  const auto &x = pair[0], &y = pair[1];
  return at::stack({x * angles.cos - y * angles.sin, y * angles.cos + x * angles.sin}, -1)
      .flatten(-2)
      .to(t.scalar_type());
}

}  // namespace gateloop::nn
