#include "ops/rms_norm.h"

#include "ops/cpu/executor.h"
#include "ops/cpu/pooled_memory.h"

namespace gateloop::ops {
namespace {

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

}  // namespace

at::Tensor rms_norm_forward(const at::Tensor& x, const at::Tensor& gamma) {
  const at::Tensor rows = contiguous(x), gain = contiguous(gamma);
  at::Tensor y = empty_pooled(x.sizes(), x.options());
  auto norm = of_rows<recurrence::RmsNorm>(rows, gain);
  norm.y = y.mutable_data_ptr();
  run_kernel(norm);
  return y;
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& gamma) {
  const at::Tensor rows = contiguous(x), gain = contiguous(gamma), grad = contiguous(dy);
  at::Tensor dx = empty_pooled(x.sizes(), x.options()), dgamma = at::empty_like(gain);
  auto norm = of_rows<recurrence::RmsNormBackward>(rows, gain);
  norm.dy = grad.const_data_ptr();
  norm.dx = dx.mutable_data_ptr();
  norm.dgain = dgamma.mutable_data_ptr();
  run_kernel(norm);
  return {dx, dgamma};
}

}  // namespace gateloop::ops
