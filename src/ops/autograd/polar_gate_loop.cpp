#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/composite/definition.h"
#include "ops/internal.h"
#include "ops/masked.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct PolarGateLoopFunction : torch::autograd::Function<PolarGateLoopFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& z,
                               const OptionalTensor& initial_state, bool reverse,
                               const OptionalTensor& cu_seqlens) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, final_state, saved_states] =
        polar_gate_loop_forward(q, k, v, z, initial_state, reverse, cu_seqlens);
    ctx->save_for_backward({q, k, v, z, initial_state.value_or(at::Tensor()), saved_states,
                            cu_seqlens.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->set_materialize_grads(false);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &z = saved[3];
    const at::Tensor &initial = saved[4], &saved_states = saved[5], &cu_seqlens = saved[6];
    const bool reverse = ctx->saved_data["reverse"].toBool();
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (needs_differentiable_backward()) {
      result = differentiate(
          [&](const variable_list& in) {
            return compute_whole(polar_gate_loop_definition(q, reverse), {in.begin(), in.end() - 1},
                                 in[4], cu_seqlens);
          },
          {q, k, v, z, initial}, grads);
      result.resize(7);
    } else {
      auto [dq, dk, dv, dz, dinitial] = polar_gate_loop_backward(grads[0], grads[1], q, k, v, z,
                                                                 saved_states, reverse, cu_seqlens);
      result = {dq, dk, dv, dz, initial.defined() ? dinitial : at::Tensor(), {}, {}};
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> polar_gate_loop_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask) {
  if (is_given(mask)) {
    return polar_gate_loop_masked(q, k, v, z, initial_state, reverse, cu_seqlens, *mask);
  }
  if (needs_pieces({q, k, v, z, initial_state})) {
    check_polar_gate_loop(q, k, v, z, initial_state, cu_seqlens);
    const auto results = compute_whole(polar_gate_loop_definition(q, reverse), {q, k, v, z},
                                       initial_state, cu_seqlens);
    return {results[0], results[1]};
  }
  // Without a backward pass to come, the forward that saves no states.
  if (!any_requires_grad({q, k, v, z, initial_state})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return polar_gate_loop(q, k, v, z, initial_state, reverse, cu_seqlens);
  }
  const auto result = PolarGateLoopFunction::apply(q, k, v, z, initial_state, reverse, cu_seqlens);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) { m.impl("polar_gate_loop", polar_gate_loop_autograd); }

}  // namespace gateloop::ops
