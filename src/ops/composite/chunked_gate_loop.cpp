/// GateLoop of wide heads in chunks of time (docs/math.md): products of matrices inside a chunk,
/// the linear recurrence from one to the next.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string>

#include "gateloop/ops.h"
#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/composite/definition.h"
#include "ops/composite/features.h"
#include "ops/composite/heads.h"
#include "ops/internal.h"
#include "ops/meta/shapes.h"

namespace gateloop::ops {
namespace {

/// (B, T, ...) -> (B chunks, steps, ...); `filling` stands behind the last step.
at::Tensor in_chunks(const at::Tensor& t, std::int64_t chunks, std::int64_t steps, double filling) {
  const std::int64_t missing = chunks * steps - t.size(1);
  std::vector<std::int64_t> sizes = t.sizes().vec();
  sizes[1] = missing;
  const at::Tensor whole =
      missing == 0 ? t : at::cat({t, at::full(sizes, filling, t.options())}, 1);
  return whole.unflatten(1, {chunks, steps}).flatten(0, 1);
}

/// The states after each chunk. `added`: what each adds, (B, chunks, H, K, V). `decays`: the decay
/// over each, (B, chunks, H, 1 or K).
std::tuple<at::Tensor, at::Tensor> states_joined(const at::Tensor& added, const at::Tensor& decays,
                                                 const at::Tensor& initial_state) {
  const auto [states, last] = linear_recurrence(decays.unsqueeze(-1).expand_as(added).flatten(2),
                                                added.flatten(2), initial_state.flatten(1));
  return {states.view_as(added), last.view_as(initial_state)};
}

Definition::Results chunks_computed(const std::vector<at::Tensor>& sequences,
                                    const at::Tensor& initial_state, std::int64_t chunk,
                                    bool reverse, c10::string_view map) {
  const Turned in = turned(sequences[0], sequences[1], sequences[2], sequences[3], reverse);
  const std::int64_t batch = in.q.size(0), time = in.q.size(1);
  const std::int64_t steps = std::min(chunk, time), chunks = (time + steps - 1) / steps;
  const auto cut = [&](const at::Tensor& t, double filling) {
    return in_chunks(t, chunks, steps, filling);
  };
  const at::Tensor k = cut(features(in.k, map), 0), v = cut(in.v, 0), a = cut(in.a, 1);
  const at::Tensor queries = by_head(cut(features(in.q, map), 0)), values = by_head(v);
  const auto by_chunk = [&](const at::Tensor& t) { return t.unflatten(0, {batch, chunks}); };
  const auto [after, last] =
      states_joined(by_chunk(state_after(k, v, a, {})), by_chunk(decay_of(a)), initial_state);
  const at::Tensor before =
      at::cat({initial_state.unsqueeze(1), after.narrow(1, 0, chunks - 1)}, 1);

  const at::Tensor inside = at::matmul(scores_inside(queries, by_head(k), a), values);
  const at::Tensor across =
      scores_of(queries * by_head(products_to(a)), before.flatten(0, 1).transpose(-1, -2));
  const at::Tensor y = by_chunk((inside + across).transpose(1, 2)).flatten(1, 2).narrow(1, 0, time);
  return {(reverse ? y.flip(1) : y).to(sequences[2].scalar_type()), last, before};
}

/// Saved states (B, chunks, H, 1 or 2, K, V) keep the parts of complex ones apart.
at::Tensor states_of(const at::Tensor& saved_states, bool is_complex) {
  if (!is_complex) return saved_states.squeeze(3);
  return at::complex(saved_states.select(3, 0), saved_states.select(3, 1));
}
at::Tensor saved_of(const at::Tensor& states) {
  if (!states.is_complex()) return states.unsqueeze(3);
  return at::stack({at::real(states), at::imag(states)}, 3);
}

/// Returns states (B, chunks, H, K, V), undefined unless `save`.
Definition::Results chunked_gate_loop_in_spans(const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v, const at::Tensor& a,
                                               const OptionalTensor& initial_state, bool reverse,
                                               const OptionalTensor& cu_seqlens,
                                               c10::string_view feature_map, bool save) {
  const auto map = feature_map_of(kChunkedGateLoop, feature_map);
  check_wide_gate_loop(kChunkedGateLoop, q, k, v, a, initial_state, cu_seqlens, map);
  Definition::Results outputs{empty_sequence(v), empty_head_state(q, v, a, cu_seqlens, map), {}};
  if (save) {
    const at::Tensor layout = empty_saved_chunks(q, v, a, cu_seqlens, map).select(3, 0);
    outputs.states = at::empty(layout.sizes(), a.options());
  }
  compute_in_spans(chunked_gate_loop_definition(q, v, a, reverse, feature_map), {q, k, v, a},
                   initial_state, cu_seqlens, outputs);
  return outputs;
}

std::tuple<at::Tensor, at::Tensor> chunked_gate_loop_composite(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  const auto [y, final_state, none] = chunked_gate_loop_in_spans(
      q, k, v, a, initial_state, reverse, cu_seqlens, feature_map, /*save=*/false);
  return {y, final_state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_gate_loop_forward_composite(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  const auto [y, final_state, states] = chunked_gate_loop_in_spans(
      q, k, v, a, initial_state, reverse, cu_seqlens, feature_map, /*save=*/true);
  return {y, final_state, saved_of(states)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
chunked_gate_loop_backward_composite(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                     const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                     const at::Tensor& a, const at::Tensor& saved_states,
                                     bool reverse, const OptionalTensor& cu_seqlens,
                                     c10::string_view feature_map) {
  constexpr auto op = "gateloop::_chunked_gate_loop_backward";
  const auto map = feature_map_of(op, feature_map);
  check_chunked_gate_loop_backward(dy, dfinal_state, q, k, v, a, saved_states, cu_seqlens, map);
  const at::Tensor dq = empty_sequence(q), dk = empty_sequence(k), dv = empty_sequence(v);
  const at::Tensor da = at::empty(a.sizes(), a.options());
  const at::Tensor dinitial = empty_head_state(q, v, a, cu_seqlens, map);
  differentiate_in_spans(op, chunked_gate_loop_definition(q, v, a, reverse, feature_map),
                         {q, k, v, a}, states_of(saved_states, a.is_complex()), dy, dfinal_state,
                         cu_seqlens, {dq, dk, dv, da, dinitial});
  return {dq, dk, dv, da, dinitial};
}

}  // namespace

Definition chunked_gate_loop_definition(const at::Tensor& q, const at::Tensor& v,
                                        const at::Tensor& a, bool reverse,
                                        c10::string_view feature_map) {
  const auto map = feature_map_of(kChunkedGateLoop, feature_map);
  const std::int64_t heads = q.size(2), values = v.size(3);
  const std::int64_t keys = state_keys(q, map).expect_int();
  const bool per_key = a.dim() == 4;
  const std::int64_t chunk = recurrence::gate_loop_chunk(per_key);
  // A chunk holds its sequences, its pairs of steps, with transitions per key for each, and a
  // state.
  const std::int64_t numbers =
      chunk * (keys + values + chunk * (per_key ? keys : 1)) + keys * values;
  return {.op = kChunkedGateLoop,
          .compute =
              [chunk, reverse, map = std::string(feature_map)](
                  const std::vector<at::Tensor>& sequences, const at::Tensor& initial_state) {
                return chunks_computed(sequences, initial_state, chunk, reverse, map);
              },
          .like = 2,
          .sizes = {heads, keys, values},
          .dtype = a.scalar_type(),
          .reverse = reverse,
          .block = chunk,
          .width = heads * numbers / chunk};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("_chunked_gate_loop", chunked_gate_loop_composite);
  m.impl("_chunked_gate_loop_forward", chunked_gate_loop_forward_composite);
  m.impl("_chunked_gate_loop_backward", chunked_gate_loop_backward_composite);
}

}  // namespace gateloop::ops
