#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"
#include "ops/internal.h"

namespace gateloop::ops {
namespace {

/// Under autocast the sequences may come in different precisions (a projection in bfloat16, a gate
/// in float32): they are taken to the widest of them. The state is float32 or wider in any case. So
/// nothing is lost in bfloat16 sequences, and nothing is gained by casting them up.
template <class... Rest>
at::ScalarType widest(const at::Tensor& first, const Rest&... rest) {
  at::ScalarType type = first.scalar_type();
  ((type = c10::promoteTypes(type, rest.scalar_type())), ...);
  return type;
}

std::tuple<at::Tensor, at::Tensor> linear_recurrence_autocast(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = widest(a, x);
  return linear_recurrence(a.to(type), x.to(type), initial_state, reverse, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor> polar_gate_loop_autocast(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = widest(q, k, v, z);
  return polar_gate_loop(q.to(type), k.to(type), v.to(type), z.to(type), initial_state, reverse,
                         cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor> simple_gate_loop_autocast(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = widest(q, kv, z);
  return simple_gate_loop(q.to(type), kv.to(type), z.to(type), initial_state, reverse,
                          normalize_input, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor> gate_loop_autocast(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask, c10::string_view form, c10::string_view feature_map) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  // Under torch.func's derivatives this guard does not reach the operators that heads are made of.
  // Their matrix products would be rounded.
  TORCH_CHECK_NOT_IMPLEMENTED(
      q.dim() != 4 || !is_differentiated() || !needs_pieces({q, k, v, a, initial_state}),
      "gateloop::gate_loop: derivatives of heads by torch.func must be taken outside of autocast, "
      "got autocast: call torch.func under torch.autocast(device, enabled=False)");
  const auto type = widest(q, k, v);
  return gate_loop(q.to(type), k.to(type), v.to(type), as_wide_as_states(a), initial_state, reverse,
                   cu_seqlens, mask, form, feature_map);
}

std::tuple<at::Tensor, at::Tensor> gate_loop_step_autocast(const at::Tensor& q, const at::Tensor& k,
                                                           const at::Tensor& v, const at::Tensor& a,
                                                           const at::Tensor& state,
                                                           c10::string_view feature_map) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = widest(q, k, v);
  return gateloop::gate_loop_step(q.to(type), k.to(type), v.to(type), as_wide_as_states(a), state,
                                  feature_map);
}

void register_all(torch::Library& m) {
  m.impl("linear_recurrence", linear_recurrence_autocast);
  m.impl("polar_gate_loop", polar_gate_loop_autocast);
  m.impl("simple_gate_loop", simple_gate_loop_autocast);
  m.impl("gate_loop", gate_loop_autocast);
  m.impl("gate_loop_step", gate_loop_step_autocast);
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, AutocastCPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(gateloop, AutocastCUDA, m) { register_all(m); }
TORCH_LIBRARY_IMPL(gateloop, AutocastMPS, m) { register_all(m); }
TORCH_LIBRARY_IMPL(gateloop, AutocastXPU, m) { register_all(m); }
TORCH_LIBRARY_IMPL(gateloop, AutocastPrivateUse1, m) { register_all(m); }

}  // namespace gateloop::ops
