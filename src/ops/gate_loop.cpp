#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/internal.h"

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> ops::gate_loop_by_linear_recurrence(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse) {
  check_gate_loop(q, k, v, a, initial_state);
  // Results have the dtypes of the arguments. Autocast would round the read-out to its own.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool wide = q.dim() == 4;
  const auto real = c10::toRealValueType(a.scalar_type());
  const at::Tensor q_ = q.to(real), k_ = k.to(real), v_ = v.to(real);
  const at::Tensor product = wide ? k_.unsqueeze(-1) * v_.unsqueeze(-2) : k_ * v_;
  const at::Tensor kv = product.to(a.scalar_type());  // (B, T, D) or (B, T, H, K, V)

  if (!wide) {
    const auto [h, final_state] = linear_recurrence(a, kv, initial_state, reverse);
    return {(q_ * (h.is_complex() ? at::real(h) : h)).to(q.scalar_type()), final_state};
  }
  const at::Tensor per_channel = a.unsqueeze(-1).unsqueeze(-1).expand_as(kv).flatten(2);
  OptionalTensor initial;
  if (initial_state.has_value() && initial_state->defined()) initial = initial_state->flatten(1);
  const auto [h, final_state] = linear_recurrence(per_channel, kv.flatten(2), initial, reverse);
  const at::Tensor states = (h.is_complex() ? at::real(h) : h).view_as(kv);
  const at::Tensor y = at::matmul(q_.unsqueeze(-2), states).squeeze(-2);
  const auto sizes = kv.sym_sizes();
  return {y.to(q.scalar_type()), final_state.view_symint({sizes[0], sizes[2], sizes[3], sizes[4]})};
}

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state=None, bool "
      "reverse=False) -> (Tensor y, Tensor final_state)",
      ops::gate_loop_by_linear_recurrence, {at::Tag::pt2_compliant_tag});
  m.def(
      "_gate_loop_recomputed(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state, bool "
      "reverse) -> (Tensor y, Tensor final_state)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("_gate_loop_recomputed", ops::gate_loop_by_linear_recurrence);
}

std::tuple<at::Tensor, at::Tensor> gate_loop(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const std::optional<at::Tensor>& initial_state,
                                             bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::gate_loop", "")
                             .typed<decltype(gate_loop)>();
  return op.call(q, k, v, a, initial_state, reverse);
}

std::tuple<at::Tensor, at::Tensor> ops::gate_loop_recomputed(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_gate_loop_recomputed", "")
                             .typed<decltype(gate_loop_recomputed)>();
  return op.call(q, k, v, a, initial_state, reverse);
}

}  // namespace gateloop
