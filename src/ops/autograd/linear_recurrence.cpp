#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/internal.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The adjoint in differentiable operators (docs/math.md): g is a recurrence against the
/// forward's direction, with a shifted by one step.
variable_list differentiable_backward(const at::Tensor& dh, const at::Tensor& dfinal_state,
                                      const at::Tensor& a, const at::Tensor& h,
                                      const at::Tensor& initial_state, bool reverse) {
  const auto state_type = accumulation_type(h.scalar_type());
  const std::int64_t steps = h.size(1);
  if (steps == 0) return {at::zeros_like(a), at::zeros_like(h), dfinal_state};
  const std::int64_t first = reverse ? steps - 1 : 0;
  const auto in_scan_order = [&](const at::Tensor& before, const at::Tensor& after) {
    return reverse ? at::cat({after, before}, 1) : at::cat({before, after}, 1);
  };
  const at::Tensor initial = initial_state.defined()
                                 ? initial_state
                                 : at::zeros({h.size(0), h.size(2)}, h.options().dtype(state_type));

  const at::Tensor a_after = a.narrow(1, reverse ? 0 : 1, steps - 1).conj();
  const at::Tensor one = at::ones({a.size(0), 1, a.size(2)}, a.options());
  const at::Tensor local = dh.defined() ? dh : at::zeros_like(h);
  const std::optional<at::Tensor> from_final =
      dfinal_state.defined() ? std::optional<at::Tensor>(dfinal_state) : std::nullopt;
  const at::Tensor g = std::get<0>(
      linear_recurrence(in_scan_order(a_after, one).resolve_conj(), local, from_final, !reverse));

  const at::Tensor h_before = in_scan_order(initial.to(h.scalar_type()).unsqueeze(1),
                                            h.narrow(1, reverse ? 1 : 0, steps - 1));
  const at::Tensor dinitial =
      (a.select(1, first).conj().to(state_type) * g.select(1, first).to(state_type));
  return {g * h_before.conj(), g, dinitial};
}

struct LinearRecurrenceFunction : torch::autograd::Function<LinearRecurrenceFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& x,
                               const OptionalTensor& initial_state, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [h, final_state] = linear_recurrence(a, x, initial_state, reverse);
    ctx->save_for_backward({a, h, initial_state.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->set_materialize_grads(false);
    return {h, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &a = saved[0], &h = saved[1], &initial = saved[2];
    const bool reverse = ctx->saved_data["reverse"].toBool();
    const auto none = at::Tensor();
    if (!grads[0].defined() && !grads[1].defined()) return {none, none, none, none};
    variable_list result;
    if (needs_differentiable_backward()) {
      result = differentiable_backward(grads[0], grads[1], a, h, initial, reverse);
    } else {
      auto [da, dx, dinitial] =
          linear_recurrence_backward(grads[0], grads[1], a, h, initial, reverse);
      result = {da, dx, dinitial};
    }
    if (!initial.defined()) result[2] = none;
    result.push_back(none);
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> linear_recurrence_autograd(const at::Tensor& a,
                                                              const at::Tensor& x,
                                                              const OptionalTensor& initial_state,
                                                              bool reverse) {
  const auto result = LinearRecurrenceFunction::apply(a, x, initial_state, reverse);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) {
  m.impl("linear_recurrence", linear_recurrence_autograd);
}

}  // namespace gateloop::ops
