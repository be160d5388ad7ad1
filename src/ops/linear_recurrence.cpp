#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/find.h"
#include "ops/internal.h"

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "linear_recurrence(Tensor a, Tensor x, Tensor? initial_state=None, bool reverse=False, "
      "Tensor? cu_seqlens=None, Tensor? mask=None) -> (Tensor h, Tensor final_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_linear_recurrence_backward(Tensor? dh, Tensor? dfinal_state, Tensor a, Tensor h, Tensor? "
      "initial_state, bool reverse, Tensor? cu_seqlens=None) -> (Tensor da, Tensor dx, Tensor "
      "dinitial_state)",
      {at::Tag::pt2_compliant_tag});
}

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> linear_recurrence(const at::Tensor& a, const at::Tensor& x,
                                                     const std::optional<at::Tensor>& initial_state,
                                                     bool reverse,
                                                     const std::optional<at::Tensor>& cu_seqlens,
                                                     const std::optional<at::Tensor>& mask) {
  static const auto op = ops::find<decltype(linear_recurrence)>("gateloop::linear_recurrence");
  return op.call(a, x, initial_state, reverse, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::linear_recurrence_backward(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens) {
  static const auto op =
      ops::find<decltype(linear_recurrence_backward)>("gateloop::_linear_recurrence_backward");
  return op.call(dh, dfinal_state, a, h, initial_state, reverse, cu_seqlens);
}

}  // namespace gateloop
