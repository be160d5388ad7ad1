#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/gradients.h"
#include "ops/composite/definition.h"
#include "ops/internal.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ChunkedGateLoopFunction : torch::autograd::Function<ChunkedGateLoopFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& a,
                               const OptionalTensor& initial_state, bool reverse,
                               const OptionalTensor& cu_seqlens, c10::string_view feature_map) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, final_state, saved_states] =
        chunked_gate_loop_forward(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
    ctx->save_for_backward({q, k, v, a, initial_state.value_or(at::Tensor()), saved_states,
                            cu_seqlens.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["feature_map"] = std::string(feature_map);
    ctx->set_materialize_grads(false);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &a = saved[3];
    const at::Tensor &initial = saved[4], &saved_states = saved[5], &packed = saved[6];
    const bool reverse = ctx->saved_data["reverse"].toBool();
    const std::string map = ctx->saved_data["feature_map"].toStringRef();
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (needs_differentiable_backward()) {
      result = differentiate(
          [&](const variable_list& in) {
            return compute_whole(chunked_gate_loop_definition(q, v, a, reverse, map),
                                 {in.begin(), in.end() - 1}, in[4], packed);
          },
          {q, k, v, a, initial}, grads);
      result.resize(8);
    } else {
      auto [dq, dk, dv, da, dinitial] = chunked_gate_loop_backward(
          grads[0], grads[1], q, k, v, a, saved_states, reverse, packed, map);
      result = {
          dq,           dk,           dv,          da, initial.defined() ? dinitial : at::Tensor(),
          at::Tensor(), at::Tensor(), at::Tensor()};
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> chunked_gate_loop_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  if (needs_pieces({q, k, v, a, initial_state})) {
    const auto results = compute_whole(chunked_gate_loop_definition(q, v, a, reverse, feature_map),
                                       {q, k, v, a}, initial_state, cu_seqlens);
    return {results[0], results[1]};
  }
  // Without a backward pass to come, the forward that saves no states.
  if (!any_requires_grad({q, k, v, a, initial_state})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return chunked_gate_loop(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
  }
  const auto result =
      ChunkedGateLoopFunction::apply(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) {
  m.impl("_chunked_gate_loop", chunked_gate_loop_autograd);
}

}  // namespace gateloop::ops
