#include "ops/rms_norm.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/find.h"

namespace gateloop::ops {
namespace {

void check_operands(const char* op, const at::Tensor& x, const at::Tensor& gamma) {
  check_all_readable(op, {{"x", x}, {"gamma", gamma}});
  TORCH_CHECK_TYPE(x.is_floating_point(), op, ": x must be floating point, got ", x.scalar_type());
  TORCH_CHECK_TYPE(gamma.is_floating_point(), op, ": gamma must be floating point, got ",
                   gamma.scalar_type());
  TORCH_CHECK(x.device() == gamma.device(), op, ": gamma must be on ", x.device(), " as x is, got ",
              gamma.device());
  TORCH_CHECK(x.dim() > 0, op, ": x must be (..., dim), got a tensor of rank 0");
  TORCH_CHECK(gamma.dim() == 1 && gamma.sym_size(0) == x.sym_size(-1), op,
              ": gamma must be (dim) = (", x.sym_size(-1), "), got ", gamma.sym_sizes());
}

}  // namespace

void check_rms_norm(const at::Tensor& x, const at::Tensor& gamma) {
  check_operands("gateloop::rms_norm", x, gamma);
}

void check_rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gamma) {
  constexpr auto op = "gateloop::_rms_norm_backward";
  check_operands(op, x, gamma);
  check_readable(op, "dy", dy);
  TORCH_CHECK_TYPE(dy.is_floating_point(), op, ": dy must be floating point, got ",
                   dy.scalar_type());
  TORCH_CHECK(dy.device() == x.device(), op, ": dy must be on ", x.device(), " as x is, got ",
              dy.device());
  TORCH_CHECK(dy.sym_sizes() == x.sym_sizes(), op, ": dy must be ", x.sym_sizes(), " as x is, got ",
              dy.sym_sizes());
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gamma) {
  static const auto op = find<decltype(rms_norm)>("gateloop::rms_norm");
  return op.call(x, gamma);
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& gamma) {
  static const auto op = find<decltype(rms_norm_backward)>("gateloop::_rms_norm_backward");
  return op.call(dy, x, gamma);
}

}  // namespace gateloop::ops

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("rms_norm(Tensor x, Tensor gamma) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_rms_norm_backward(Tensor dy, Tensor x, Tensor gamma) -> (Tensor dx, Tensor dgamma)",
        {at::Tag::pt2_compliant_tag});
}
