/// RMSNorm in torch's operators: on devices without a kernel, and under torch.func.vmap, whose rule
/// for the operator is that of its pieces.
#include "ops/rms_norm.h"

#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include "ops/checks.h"
#include "ops/composite/stand_in.h"

namespace gateloop::ops {
namespace {

at::ScalarType wide(const at::Tensor& x) { return accumulation_type(x.scalar_type()); }

double floor_of(const at::Tensor& x) { return x.scalar_type() == at::kHalf ? 0x1p-24 : 1e-12; }

at::Tensor norm_of(const at::Tensor& x) {
  return at::linalg_vector_norm(x, 2, -1, /*keepdim=*/true, wide(x));
}

c10::SymFloat root_of_dim(const at::Tensor& gamma) {
  return c10::SymFloat(gamma.sym_size(0)).sqrt();
}

// √dim joins gamma, which is small, instead of taking a pass of its own over x.
at::Tensor gain_of(const at::Tensor& gamma) { return gamma.to(wide(gamma)) * root_of_dim(gamma); }

}  // namespace

at::Tensor rms_norm_composite(const at::Tensor& x, const at::Tensor& gamma) {
  check_rms_norm(x, gamma);
  warn_of_missing_kernels(x);
  const at::Tensor y = x / norm_of(x).clamp_min(floor_of(x)) * gain_of(gamma);
  return y.to(at::result_type(x, gamma));
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_composite(const at::Tensor& dy,
                                                               const at::Tensor& x,
                                                               const at::Tensor& gamma) {
  check_rms_norm_backward(dy, x, gamma);
  const at::Tensor norm = norm_of(x), bounded = norm.clamp_min(floor_of(x));
  const at::Tensor unit = x / bounded, dscaled = dy * gain_of(gamma);
  const at::Tensor along = (unit * dscaled).sum(-1, /*keepdim=*/true) * norm.ge(floor_of(x));
  const at::Tensor dx = (dscaled - unit * along) / bounded;
  const at::Tensor parts = dy * unit * root_of_dim(gamma);
  const at::Tensor dgamma = at::sum_to(parts, gamma.sym_sizes());
  return {dx.to(x.scalar_type()), dgamma.to(gamma.scalar_type())};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("rms_norm", rms_norm_composite);
  m.impl("_rms_norm_backward", rms_norm_backward_composite);
}

TORCH_LIBRARY_IMPL(gateloop, FuncTorchBatched, m) {
  m.impl("rms_norm", rms_norm_composite);
  m.impl("_rms_norm_backward", rms_norm_backward_composite);
}

}  // namespace gateloop::ops
