#include "nn/transition.h"

namespace gateloop::nn {

void scale_gradient(const torch::Tensor& z, double fraction) {
  if (fraction == 1.0 || !z.requires_grad()) return;
  z.register_hook([fraction](const torch::Tensor& grad) { return grad * fraction; });
}

torch::Tensor drop_imaginary(const torch::Tensor& z) {
  const auto keep_real = at::arange(1, -1, -1, z.options());  // (1, 0)
  return (z.unflatten(-1, {-1, 2}) * keep_real).flatten(-2);
}

torch::Tensor polar_gate(const torch::Tensor& z) {
  const auto wide = z.scalar_type() == torch::kDouble ? z : z.to(torch::kFloat);
  const auto complex = at::view_as_complex(wide.unflatten(-1, {-1, 2}));
  return at::polar(complex.abs().sigmoid(), complex.angle());
}

}  // namespace gateloop::nn
