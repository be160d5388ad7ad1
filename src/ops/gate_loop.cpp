#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/internal.h"

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "gate_loop(Tensor q, Tensor k, Tensor v, Tensor z, Tensor? initial_state=None, bool "
      "reverse=False) -> (Tensor y, Tensor final_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gate_loop_forward(Tensor q, Tensor k, Tensor v, Tensor z, Tensor? initial_state, bool "
      "reverse) -> (Tensor y, Tensor final_state, Tensor checkpoints)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_gate_loop_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor "
      "z, Tensor checkpoints, bool reverse) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dz, Tensor "
      "dinitial_state)",
      {at::Tag::pt2_compliant_tag});
}

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> gate_loop(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& z,
                                             const std::optional<at::Tensor>& initial_state,
                                             bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::gate_loop", "")
                             .typed<decltype(gate_loop)>();
  return op.call(q, k, v, z, initial_state, reverse);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::gate_loop_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_gate_loop_forward", "")
                             .typed<decltype(gate_loop_forward)>();
  return op.call(q, k, v, z, initial_state, reverse);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> ops::gate_loop_backward(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& z, const at::Tensor& checkpoints,
    bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_gate_loop_backward", "")
                             .typed<decltype(gate_loop_backward)>();
  return op.call(dy, dfinal_state, q, k, v, z, checkpoints, reverse);
}

}  // namespace gateloop
