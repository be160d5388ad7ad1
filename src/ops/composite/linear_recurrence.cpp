#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/composite/blocked_scan.h"
#include "ops/composite/stand_in.h"
#include "ops/internal.h"
#include "ops/masked.h"
#include "ops/meta/shapes.h"
#include "ops/offsets.h"

namespace gateloop::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> linear_recurrence_composite(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return linear_recurrence_masked(a, x, initial_state, reverse, cu_seqlens, *mask);
  }
  check_linear_recurrence(a, x, initial_state, cu_seqlens);
  warn_of_missing_kernels(x);
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  const auto offsets = sequence_offsets("gateloop::linear_recurrence", cu_seqlens, x.size(1));
  const at::Tensor h = empty_sequence(x);
  const at::Tensor state = empty_state(x, accumulation_type(x.scalar_type()), cu_seqlens);
  is_given(initial_state) ? state.copy_(*initial_state) : state.zero_();
  const at::Tensor a_ = a.resolve_conj(), x_ = x.resolve_conj();
  if (offsets.empty()) return {h, blocked_scan(a_, x_, state, reverse, h)};
  for (std::int64_t n = 0; n + 1 < std::ssize(offsets); ++n) {
    const auto at = static_cast<std::size_t>(n);
    const auto part = [&](const at::Tensor& t) {
      return t.narrow(1, offsets[at], offsets[at + 1] - offsets[at]);
    };
    const at::Tensor mine = state.narrow(0, n, 1);
    mine.copy_(blocked_scan(part(a_), part(x_), mine, reverse, part(h)));
  }
  return {h, state};
}

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

  Borders(const at::Tensor& cu_seqlens, const at::Device& device, std::int64_t steps,
          bool reverse) {
    const at::Tensor cuts = cu_seqlens.to(device, at::kLong);
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

}  // namespace

/// The adjoint (docs/math.md): g is a recurrence against the forward's direction, with a shifted by
/// one step within each sequence. Differentiable.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_recurrence_backward_composite(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens) {
  check_linear_recurrence_backward(dh, dfinal_state, a, h, initial_state, cu_seqlens);
  sequence_offsets("gateloop::_linear_recurrence_backward", cu_seqlens, h.size(1));
  const auto type = accumulation_type(h.scalar_type());
  const std::int64_t steps = h.size(1);
  const bool packed = is_given(cu_seqlens);
  const auto or_zeros = [&](const OptionalTensor& state) {
    return is_given(state) ? *state : empty_state(h, type, cu_seqlens).zero_();
  };
  const at::Tensor dfinal = or_zeros(dfinal_state), initial = or_zeros(initial_state);
  if (steps == 0) return {at::zeros_like(a), at::zeros_like(h), dfinal.clone()};
  const std::optional<Borders> borders =
      packed ? std::optional<Borders>(std::in_place, *cu_seqlens, h.device(), steps, reverse)
             : std::nullopt;

  const at::Tensor wide_a = a.to(type);
  const at::Tensor one = at::ones({a.size(0), 1, a.size(2)}, wide_a.options());
  at::Tensor a_after = shifted(wide_a.conj(), one, /*later=*/reverse);
  if (packed) a_after = a_after.masked_fill(borders->last, 1);
  const at::Tensor local = is_given(dh) ? dh->to(type) : at::zeros_like(h, type);
  const at::Tensor g =
      std::get<0>(linear_recurrence(a_after.resolve_conj(), local, dfinal, !reverse, cu_seqlens));
  a_after.reset();

  at::Tensor h_before, dinitial;
  if (packed) {
    // The border of the whole is the border of a sequence, so that what stands there is not used.
    h_before = at::where(borders->first, initial.index_select(0, borders->sequence).unsqueeze(0),
                         shifted(h.to(type), one, /*later=*/!reverse));
    const auto at_start = [&](const at::Tensor& t) {
      return t.index_select(1, borders->start).squeeze(0);
    };
    dinitial = at::where(borders->empty, dfinal, at_start(wide_a).conj() * at_start(g));
  } else {
    h_before = shifted(h.to(type), initial.unsqueeze(1), /*later=*/!reverse);
    const std::int64_t first = reverse ? steps - 1 : 0;
    dinitial = wide_a.select(1, first).conj() * g.select(1, first);
  }
  return {(g * h_before.conj()).to(a.scalar_type()), g.to(h.scalar_type()), dinitial};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("linear_recurrence", linear_recurrence_composite);
  m.impl("_linear_recurrence_backward", linear_recurrence_backward_composite);
}

}  // namespace gateloop::ops
