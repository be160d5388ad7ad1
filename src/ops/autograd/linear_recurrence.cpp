#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/masked.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// t (B, T, D) one step later in time, or earlier; `border` (B, 1, D) takes the free place.
at::Tensor shifted(const at::Tensor& t, const at::Tensor& border, bool later) {
  const std::int64_t kept = t.size(1) - 1;
  return later ? at::cat({border, t.narrow(1, 0, kept)}, 1)
               : at::cat({t.narrow(1, 1, kept), border}, 1);
}

/// Where the scan of packed sequences starts and ends, from cu_seqlens (N + 1), for T > 0 steps.
struct Borders {
  at::Tensor first, last;  // (T, 1) bool: steps that begin and end a sequence in scan order
  at::Tensor sequence;     // (T): of each step
  at::Tensor start;        // (N): the first step of each sequence, any step of an empty one
  at::Tensor empty;        // (N, 1) bool

  Borders(const at::Tensor& cu_seqlens, std::int64_t steps, bool reverse) {
    const at::Tensor cuts = cu_seqlens.to(at::kLong);
    const std::int64_t count = cuts.size(0) - 1;
    const at::Tensor begin = cuts.narrow(0, 0, count), end = cuts.narrow(0, 1, count);
    const at::Tensor cut = at::zeros({steps + 1, 1}, cuts.options().dtype(at::kBool))
                               .index_fill(0, cuts, /*value=*/true);
    first = cut.narrow(0, reverse ? 1 : 0, steps);
    last = cut.narrow(0, reverse ? 0 : 1, steps);
    sequence = at::searchsorted(cuts, at::arange(steps, cuts.options()), /*out_int32=*/false,
                                /*right=*/true) -
               1;
    start = (reverse ? end - 1 : begin).clamp(0, steps - 1);
    empty = begin.eq(end).unsqueeze(1);
  }
};

/// The adjoint in differentiable operators (docs/math.md): g is a recurrence against the
/// forward's direction, with a shifted by one step within each sequence.
variable_list differentiable_backward(const at::Tensor& dh, const at::Tensor& dfinal_state,
                                      const at::Tensor& a, const at::Tensor& h,
                                      const at::Tensor& initial_state, bool reverse,
                                      const at::Tensor& cu_seqlens) {
  const auto state_type = accumulation_type(h.scalar_type());
  const std::int64_t steps = h.size(1);
  if (steps == 0) return {at::zeros_like(a), at::zeros_like(h), dfinal_state};
  const bool packed = cu_seqlens.defined();
  const std::optional<Borders> borders =
      packed ? std::optional<Borders>(std::in_place, cu_seqlens, steps, reverse) : std::nullopt;
  const at::Tensor zeros = at::zeros({packed ? cu_seqlens.size(0) - 1 : h.size(0), h.size(2)},
                                     h.options().dtype(state_type));
  const at::Tensor initial = initial_state.defined() ? initial_state : zeros;

  const at::Tensor one = at::ones({a.size(0), 1, a.size(2)}, a.options());
  at::Tensor a_after = shifted(a.conj(), one, /*later=*/reverse);
  if (packed) a_after = a_after.masked_fill(borders->last, 1);
  const at::Tensor local = dh.defined() ? dh : at::zeros_like(h);
  const OptionalTensor from_final =
      dfinal_state.defined() ? OptionalTensor(dfinal_state) : std::nullopt;
  const at::Tensor g = std::get<0>(
      linear_recurrence(a_after.resolve_conj(), local, from_final, !reverse, cu_seqlens));

  at::Tensor h_before, dinitial;
  const at::Tensor state = initial.to(h.scalar_type());
  if (packed) {
    // The border of the whole is the border of a sequence, so that what stands there is not used.
    h_before = at::where(borders->first, state.index_select(0, borders->sequence).unsqueeze(0),
                         shifted(h, one.to(h.scalar_type()), /*later=*/!reverse));
    const auto at_start = [&](const at::Tensor& t) {
      return t.index_select(1, borders->start).squeeze(0).to(state_type);
    };
    dinitial =
        at::where(borders->empty, from_final.value_or(zeros), at_start(a).conj() * at_start(g));
  } else {
    h_before = shifted(h, state.unsqueeze(1), /*later=*/!reverse);
    const std::int64_t first = reverse ? steps - 1 : 0;
    dinitial = a.select(1, first).conj().to(state_type) * g.select(1, first).to(state_type);
  }
  return {g * h_before.conj(), g, dinitial};
}

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
    variable_list result(5);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (needs_differentiable_backward()) {
      result = differentiable_backward(grads[0], grads[1], a, h, initial, reverse, cu_seqlens);
    } else {
      auto [da, dx, dinitial] =
          linear_recurrence_backward(grads[0], grads[1], a, h, initial, reverse, cu_seqlens);
      result = {da, dx, dinitial};
    }
    if (!initial.defined()) result[2] = at::Tensor();
    result.resize(5);
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> linear_recurrence_autograd(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return linear_recurrence_masked(a, x, initial_state, reverse, cu_seqlens, *mask);
  }
  const auto result = LinearRecurrenceFunction::apply(a, x, initial_state, reverse, cu_seqlens);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) {
  m.impl("linear_recurrence", linear_recurrence_autograd);
}

}  // namespace gateloop::ops
