#include <torch/library.h>

#include "ops/linear_row.h"

namespace gateloop::ops {
namespace {

/// at::linear, or one row by a kernel of our own: for Python, which cannot see which applies.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  return is_linear_row(x, weight) ? linear_row(x, weight, bias) : at::linear(x, weight, bias);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear);
}

}  // namespace gateloop::ops
