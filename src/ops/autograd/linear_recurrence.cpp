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

struct LinearRecurrenceFunction : torch::autograd::Function<LinearRecurrenceFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& x,
                               const OptionalTensor& initial_state, bool reverse,
                               const OptionalTensor& cu_seqlens) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [h, final_state] = linear_recurrence(a, x, initial_state, reverse, cu_seqlens);
    ctx->save_for_backward(
        {a, h, initial_state.value_or(at::Tensor()), cu_seqlens.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->set_materialize_grads(false);
    return {h, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &a = saved[0], &h = saved[1], &initial = saved[2], &cu_seqlens = saved[3];
    const bool reverse = ctx->saved_data["reverse"].toBool();
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(5);
    const auto backward = needs_differentiable_backward() ? linear_recurrence_backward_composite
                                                          : linear_recurrence_backward;
    auto [da, dx, dinitial] = backward(grads[0], grads[1], a, h, initial, reverse, cu_seqlens);
    return {da, dx, initial.defined() ? dinitial : at::Tensor(), {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> linear_recurrence_autograd(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return linear_recurrence_masked(a, x, initial_state, reverse, cu_seqlens, *mask);
  }
  const bool needs_graph = any_requires_grad({a, x, initial_state});
  if (needs_graph && needs_pieces({a, x, initial_state})) {
    check_linear_recurrence(a, x, initial_state, cu_seqlens);
    const auto results =
        compute_whole(linear_recurrence_definition(x, reverse), {a, x}, initial_state, cu_seqlens);
    return {results[0], results[1]};
  }
  if (any_has_tangent({a, x, initial_state})) {
    return linear_recurrence_dual(a, x, initial_state, reverse, cu_seqlens);
  }
  if (!needs_graph) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_recurrence(a, x, initial_state, reverse, cu_seqlens);
  }
  const auto result = LinearRecurrenceFunction::apply(a, x, initial_state, reverse, cu_seqlens);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) {
  m.impl("linear_recurrence", linear_recurrence_autograd);
}

}  // namespace gateloop::ops
