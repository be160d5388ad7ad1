#include "ops/rms_norm.h"

#include <torch/library.h>

#include <algorithm>

#include "ops/checks.h"
#include "ops/kernels/executor.h"
#include "ops/kernels/pooled_memory.h"

namespace gateloop::ops {
namespace {

/// The kernel takes one dtype; others are promoted by torch's operators.
bool have_one_dtype(std::initializer_list<at::Tensor> tensors) {
  const auto dtype = tensors.begin()->scalar_type();
  return std::ranges::find(kRealTypes, dtype) != kRealTypes.end() &&
         std::ranges::all_of(tensors,
                             [&](const at::Tensor& t) { return t.scalar_type() == dtype; });
}

template <class Params>
Params of_rows(const at::Tensor& x, const at::Tensor& gamma) {
  Params p;
  p.dtype = kernel_dtype(x.scalar_type());
  p.columns = gamma.numel();
  p.rows = p.columns == 0 ? 0 : x.numel() / p.columns;
  p.x = x.const_data_ptr();
  p.gain = gamma.const_data_ptr();
  return p;
}

at::Tensor rms_norm_kernel(const at::Tensor& x, const at::Tensor& gamma) {
  if (!have_one_dtype({x, gamma})) return rms_norm_composite(x, gamma);
  check_rms_norm(x, gamma);
  const at::Tensor rows = contiguous(x), gain = contiguous(gamma);
  at::Tensor y = empty_pooled(x.sizes(), x.options());
  auto norm = of_rows<recurrence::RmsNorm>(rows, gain);
  norm.y = y.mutable_data_ptr();
  run_kernel(norm, x.device());
  return y;
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_kernel(const at::Tensor& dy,
                                                            const at::Tensor& x,
                                                            const at::Tensor& gamma) {
  if (!have_one_dtype({dy, x, gamma})) return rms_norm_backward_composite(dy, x, gamma);
  check_rms_norm_backward(dy, x, gamma);
  const at::Tensor rows = contiguous(x), gain = contiguous(gamma), grad = contiguous(dy);
  at::Tensor dx = empty_pooled(x.sizes(), x.options()), dgamma = at::empty_like(gain);
  auto norm = of_rows<recurrence::RmsNormBackward>(rows, gain);
  norm.dy = grad.const_data_ptr();
  norm.dx = dx.mutable_data_ptr();
  norm.dgain = dgamma.mutable_data_ptr();
  run_kernel(norm, x.device());
  return {dx, dgamma};
}

void register_rms_norm(torch::Library& m) {
  m.impl("rms_norm", rms_norm_kernel);
  m.impl("_rms_norm_backward", rms_norm_backward_kernel);
}

}  // namespace

GATELOOP_REGISTER_KERNELS(register_rms_norm)

}  // namespace gateloop::ops
