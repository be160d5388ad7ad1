#include "ops/rms_norm.h"

#include <torch/library.h>

namespace gateloop::ops {
namespace {

at::Tensor rms_norm_meta(const at::Tensor& x, const at::Tensor& gamma) {
  check_rms_norm(x, gamma);
  return at::empty_symint(x.sym_sizes(), x.options().dtype(at::result_type(x, gamma)));
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                                          const at::Tensor& gamma) {
  check_rms_norm_backward(dy, x, gamma);
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint(gamma.sym_sizes(), gamma.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Meta, m) {
  m.impl("rms_norm", rms_norm_meta);
  m.impl("_rms_norm_backward", rms_norm_backward_meta);
}

}  // namespace gateloop::ops
