#include <torch/library.h>

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/composite/blocked_scan.h"
#include "ops/composite/definition.h"
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
  return {h, offsets.empty() ? blocked_scan(a_, x_, state, reverse, h)
                             : packed_scan(a_, x_, state, offsets, reverse, h)};
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

std::optional<Borders> borders_of(const OptionalTensor& cu_seqlens, const at::Tensor& sequence,
                                  bool reverse) {
  if (!is_given(cu_seqlens)) return {};
  return std::optional<Borders>(std::in_place, *cu_seqlens, sequence.device(), sequence.size(1),
                                reverse);
}

/// h (B, T, D) before each step, T > 0. The recurrence begins in `initial`, (B, D) or (N, D).
at::Tensor before_each_step(const at::Tensor& h, const at::Tensor& initial,
                            const std::optional<Borders>& borders, bool reverse) {
  if (!borders) return shifted(h, initial.unsqueeze(1), /*later=*/!reverse);
  // The border of the whole is the border of a sequence, so that what stands there is not used.
  return at::where(borders->first, initial.index_select(0, borders->sequence).unsqueeze(0),
                   shifted(h, h.narrow(1, 0, 1), /*later=*/!reverse));
}

}  // namespace

/// The operator of associative scans, (a2 a1, a2 x1 + x2), between steps that are 1, 2, 4 ...
/// apart.
Definition linear_recurrence_definition(const at::Tensor& x, bool reverse) {
  const auto type = accumulation_type(x.scalar_type());
  const auto compute = [type, reverse](const std::vector<at::Tensor>& in,
                                       const at::Tensor& initial_state,
                                       const OptionalTensor&) -> Definition::Results {
    const auto in_order = [&](const at::Tensor& t) { return reverse ? t.flip(1) : t; };
    at::Tensor a = in_order(in[0].to(type)), h = in_order(in[1].to(type));
    const std::int64_t steps = h.size(1);
    const auto first = [](const at::Tensor& t, std::int64_t n) { return t.narrow(1, 0, n); };
    const auto last = [](const at::Tensor& t, std::int64_t n) {
      return t.narrow(1, t.size(1) - n, n);
    };
    h = at::cat({first(a, 1) * initial_state.unsqueeze(1) + first(h, 1), last(h, steps - 1)}, 1);
    for (std::int64_t apart = 1; apart < steps; apart *= 2) {
      const std::int64_t rest = steps - apart;
      h = at::cat({first(h, apart), last(a, rest) * first(h, rest) + last(h, rest)}, 1);
      a = at::cat({first(a, apart), last(a, rest) * first(a, rest)}, 1);
    }
    return {in_order(h).to(in[1].scalar_type()), h.select(1, steps - 1), {}};
  };
  return {.op = "gateloop::linear_recurrence",
          .compute = compute,
          .like = 1,
          .sizes = {x.size(2)},
          .dtype = type,
          .reverse = reverse};
}

/// dh_t = a_t dh_{t-1} + (da_t h_{t-1} + dx_t): the recurrence again, on another input.
/// Differentiable.
std::tuple<at::Tensor, at::Tensor> linear_recurrence_dual(const at::Tensor& a, const at::Tensor& x,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens) {
  constexpr std::int64_t kLevel = 0;  // torch has one
  const auto type = accumulation_type(x.scalar_type());
  const auto given =
      is_given(initial_state) ? *initial_state : empty_state(x, type, cu_seqlens).zero_();
  const at::Tensor a_ = a._fw_primal(kLevel), x_ = x._fw_primal(kLevel);
  const at::Tensor initial = given._fw_primal(kLevel);
  const at::Tensor &da = a._fw_grad(kLevel), &dx = x._fw_grad(kLevel);
  const at::Tensor& dinitial = given._fw_grad(kLevel);

  const auto [h, state] = linear_recurrence(a_, x_, initial, reverse, cu_seqlens);
  at::Tensor input = dx.defined() ? dx : at::zeros_like(x_);
  if (da.defined() && x.size(1) > 0) {
    const auto borders = borders_of(cu_seqlens, x_, reverse);
    input =
        (input + da * before_each_step(h.to(type), initial, borders, reverse)).to(x.scalar_type());
  }
  const auto [dh, dstate] = linear_recurrence(
      a_, input.resolve_conj(),
      dinitial.defined() ? OptionalTensor(dinitial.resolve_conj()) : OptionalTensor(), reverse,
      cu_seqlens);
  return {at::_make_dual(h, dh, kLevel), at::_make_dual(state, dstate, kLevel)};
}

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
  const auto or_zeros = [&](const OptionalTensor& state) {
    return is_given(state) ? *state : empty_state(h, type, cu_seqlens).zero_();
  };
  const at::Tensor dfinal = or_zeros(dfinal_state), initial = or_zeros(initial_state);
  if (steps == 0) return {at::zeros_like(a), at::zeros_like(h), dfinal.clone()};
  const auto borders = borders_of(cu_seqlens, h, reverse);

  const at::Tensor wide_a = a.to(type);
  const at::Tensor one = at::ones({a.size(0), 1, a.size(2)}, wide_a.options());
  // conj() would leave the work to a dispatch key that a Python dispatch mode has excluded here.
  at::Tensor a_after = shifted(wide_a.conj_physical(), one, /*later=*/reverse);
  if (borders) a_after = a_after.masked_fill(borders->last, 1);
  const at::Tensor local = is_given(dh) ? dh->to(type) : at::zeros_like(h, type);
  const at::Tensor g = std::get<0>(linear_recurrence(a_after, local, dfinal, !reverse, cu_seqlens));
  a_after.reset();

  const at::Tensor h_before = before_each_step(h.to(type), initial, borders, reverse);
  at::Tensor dinitial;
  if (borders) {
    const auto at_start = [&](const at::Tensor& t) {
      return t.index_select(1, borders->start).squeeze(0);
    };
    dinitial = at::where(borders->empty, dfinal, at_start(wide_a).conj_physical() * at_start(g));
  } else {
    const std::int64_t first = reverse ? steps - 1 : 0;
    dinitial = wide_a.select(1, first).conj_physical() * g.select(1, first);
  }
  return {(g * h_before.conj_physical()).to(a.scalar_type()), g.to(h.scalar_type()), dinitial};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("linear_recurrence", linear_recurrence_composite);
  m.impl("_linear_recurrence_backward", linear_recurrence_backward_composite);
}

}  // namespace gateloop::ops
