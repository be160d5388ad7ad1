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

struct SimpleGateLoopFunction : torch::autograd::Function<SimpleGateLoopFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& kv,
                               const at::Tensor& z, const OptionalTensor& initial_state,
                               bool reverse, bool normalize_input,
                               const OptionalTensor& cu_seqlens) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, final_state, saved_states] =
        simple_gate_loop_forward(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens);
    ctx->save_for_backward({q, kv, z, initial_state.value_or(at::Tensor()), saved_states,
                            cu_seqlens.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["normalize_input"] = normalize_input;
    ctx->set_materialize_grads(false);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &kv = saved[1], &z = saved[2];
    const at::Tensor &initial = saved[3], &saved_states = saved[4], &cu_seqlens = saved[5];
    const bool reverse = ctx->saved_data["reverse"].toBool();
    const bool normalize_input = ctx->saved_data["normalize_input"].toBool();
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (needs_differentiable_backward()) {
      result = differentiate(
          [&](const variable_list& in) {
            return compute_whole(simple_gate_loop_definition(q, reverse, normalize_input),
                                 {in.begin(), in.end() - 1}, in[3], cu_seqlens);
          },
          {q, kv, z, initial}, grads);
      result.resize(7);
    } else {
      auto [dq, dkv, dz, dinitial] = simple_gate_loop_backward(
          grads[0], grads[1], q, kv, z, saved_states, reverse, normalize_input, cu_seqlens);
      result = {dq, dkv, dz, initial.defined() ? dinitial : at::Tensor(), {}, {}, {}};
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> simple_gate_loop_autograd(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return simple_gate_loop_masked(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens,
                                   *mask);
  }
  if (needs_pieces({q, kv, z, initial_state})) {
    check_simple_gate_loop(q, kv, z, initial_state, cu_seqlens);
    const auto results = compute_whole(simple_gate_loop_definition(q, reverse, normalize_input),
                                       {q, kv, z}, initial_state, cu_seqlens);
    return {results[0], results[1]};
  }
  // Without a backward pass to come, the forward that saves no states.
  if (!any_requires_grad({q, kv, z, initial_state})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return simple_gate_loop(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens);
  }
  const auto result =
      SimpleGateLoopFunction::apply(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) { m.impl("simple_gate_loop", simple_gate_loop_autograd); }

}  // namespace gateloop::ops
