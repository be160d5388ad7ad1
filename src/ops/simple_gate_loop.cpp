#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/find.h"
#include "ops/internal.h"

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "simple_gate_loop(Tensor q, Tensor kv, Tensor z, Tensor? initial_state=None, bool "
      "reverse=False, bool normalize_input=False, Tensor? cu_seqlens=None, Tensor? mask=None) -> "
      "(Tensor y, Tensor final_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_simple_gate_loop_forward(Tensor q, Tensor kv, Tensor z, Tensor? initial_state, bool "
      "reverse, bool normalize_input, Tensor? cu_seqlens=None) -> (Tensor y, Tensor "
      "final_state, Tensor saved_states)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_simple_gate_loop_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor kv, Tensor z, "
      "Tensor saved_states, bool reverse, bool normalize_input, Tensor? cu_seqlens=None) -> "
      "(Tensor dq, Tensor dkv, Tensor dz, Tensor dinitial_state)",
      {at::Tag::pt2_compliant_tag});
}

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> simple_gate_loop(const at::Tensor& q, const at::Tensor& kv,
                                                    const at::Tensor& z,
                                                    const std::optional<at::Tensor>& initial_state,
                                                    bool reverse, bool normalize_input,
                                                    const std::optional<at::Tensor>& cu_seqlens,
                                                    const std::optional<at::Tensor>& mask) {
  static const auto op = ops::find<decltype(simple_gate_loop)>("gateloop::simple_gate_loop");
  return op.call(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::simple_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens) {
  static const auto op =
      ops::find<decltype(simple_gate_loop_forward)>("gateloop::_simple_gate_loop_forward");
  return op.call(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ops::simple_gate_loop_backward(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& kv, const at::Tensor& z, const at::Tensor& saved_states, bool reverse,
    bool normalize_input, const OptionalTensor& cu_seqlens) {
  static const auto op =
      ops::find<decltype(simple_gate_loop_backward)>("gateloop::_simple_gate_loop_backward");
  return op.call(dy, dfinal_state, q, kv, z, saved_states, reverse, normalize_input, cu_seqlens);
}

}  // namespace gateloop
