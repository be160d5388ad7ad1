#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/find.h"
#include "ops/internal.h"

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "polar_gate_loop(Tensor q, Tensor k, Tensor v, Tensor z, Tensor? initial_state=None, bool "
      "reverse=False, Tensor? cu_seqlens=None, Tensor? mask=None) -> (Tensor y, Tensor "
      "final_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_polar_gate_loop_forward(Tensor q, Tensor k, Tensor v, Tensor z, Tensor? initial_state, "
      "bool reverse, Tensor? cu_seqlens=None) -> (Tensor y, Tensor final_state, Tensor "
      "saved_states)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_polar_gate_loop_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor "
      "v, Tensor z, Tensor saved_states, bool reverse, Tensor? cu_seqlens=None) -> (Tensor dq, "
      "Tensor dk, Tensor dv, Tensor dz, Tensor dinitial_state)",
      {at::Tag::pt2_compliant_tag});
}

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> polar_gate_loop(const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v, const at::Tensor& z,
                                                   const std::optional<at::Tensor>& initial_state,
                                                   bool reverse,
                                                   const std::optional<at::Tensor>& cu_seqlens,
                                                   const std::optional<at::Tensor>& mask) {
  static const auto op = ops::find<decltype(polar_gate_loop)>("gateloop::polar_gate_loop");
  return op.call(q, k, v, z, initial_state, reverse, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::polar_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens) {
  static const auto op =
      ops::find<decltype(polar_gate_loop_forward)>("gateloop::_polar_gate_loop_forward");
  return op.call(q, k, v, z, initial_state, reverse, cu_seqlens);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
ops::polar_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                              const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& z, const at::Tensor& saved_states, bool reverse,
                              const OptionalTensor& cu_seqlens) {
  static const auto op =
      ops::find<decltype(polar_gate_loop_backward)>("gateloop::_polar_gate_loop_backward");
  return op.call(dy, dfinal_state, q, k, v, z, saved_states, reverse, cu_seqlens);
}

}  // namespace gateloop
