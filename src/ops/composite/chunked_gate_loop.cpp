/// GateLoop of wide heads in chunks of time (docs/math.md): products of matrices inside a chunk,
/// the linear recurrence from one to the next.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "gateloop/ops.h"
#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/composite/definition.h"
#include "ops/composite/features.h"
#include "ops/composite/heads.h"
#include "ops/composite/index.h"
#include "ops/internal.h"
#include "ops/meta/shapes.h"
#include "ops/offsets.h"

namespace gateloop::ops {
namespace {

/// Cuts (B, T, ...) into chunks in scan order. Packed sequences are padded each to whole chunks.
class Chunks {
 public:
  Chunks(const at::Tensor& sequence, std::int64_t longest, bool reverse,
         const OptionalTensor& cu_seqlens)
      : batch_(sequence.size(0)), time_(sequence.size(1)), reverse_(reverse) {
    const auto offsets = sequence_offsets(kChunkedGateLoop, cu_seqlens, time_);
    if (offsets.empty()) {
      steps_ = std::min(longest, time_);
      count_ = (time_ + steps_ - 1) / steps_;
      return;
    }
    for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
      steps_ = std::max(steps_, std::min(longest, offsets[n + 1] - offsets[n]));
    }
    std::vector<std::int64_t> places(static_cast<std::size_t>(time_)), starts = {0}, before;
    const std::int64_t sequences = std::ssize(offsets) - 1;
    for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
      const std::int64_t begin = offsets[n], steps = offsets[n + 1] - begin;
      for (std::int64_t s = 0; s < steps; ++s) {
        const std::int64_t t = reverse ? begin + steps - 1 - s : begin + s;
        places[static_cast<std::size_t>(t)] = starts.back() * steps_ + s;
      }
      const std::int64_t chunks = (steps + steps_ - 1) / steps_;
      for (std::int64_t c = 0; c < chunks; ++c) {
        const std::int64_t chunk = starts.back() + c;
        before.push_back(c == 0 ? static_cast<std::int64_t>(n) : sequences + chunk - 1);
      }
      starts.push_back(starts.back() + chunks);
    }
    count_ = starts.back();
    cu_chunks_ = host_index(starts);
    places_ = index_for(sequence, places);
    before_ = index_for(sequence, before);
  }

  /// (B, T, ...) -> (B chunks, steps, ...); `filling` stands where there is no step.
  at::Tensor cut(const at::Tensor& t, double filling) const {
    std::vector<std::int64_t> sizes = t.sizes().vec();
    at::Tensor whole = t;
    if (cu_chunks_) {
      sizes[1] = count_ * steps_;
      whole = at::full(sizes, filling, t.options()).index_copy(1, places_, t);
    } else {
      if (reverse_) whole = whole.flip(1);
      sizes[1] = count_ * steps_ - time_;
      if (sizes[1] > 0) whole = at::cat({whole, at::full(sizes, filling, t.options())}, 1);
    }
    return whole.unflatten(1, {count_, steps_}).flatten(0, 1);
  }

  /// (B chunks, ...) -> (B, chunks, ...).
  at::Tensor by_chunk(const at::Tensor& t) const { return t.unflatten(0, {batch_, count_}); }

  /// (B chunks, steps, ...) -> (B, T, ...).
  at::Tensor joined(const at::Tensor& t) const {
    const at::Tensor whole = by_chunk(t).flatten(1, 2);
    if (cu_chunks_) return whole.index_select(1, places_);
    const at::Tensor in_order = whole.narrow(1, 0, time_);
    return reverse_ ? in_order.flip(1) : in_order;
  }

  struct States {
    at::Tensor before, last;  // (B, chunks, H, K, V), (B or N, H, K, V)
  };
  /// `added`: what each chunk adds, (B, chunks, H, K, V). `decays`: the decay over each, (B,
  /// chunks, H, 1 or K).
  States states(const at::Tensor& added, const at::Tensor& decays,
                const at::Tensor& initial_state) const {
    const auto [states, last] = linear_recurrence(decays.unsqueeze(-1).expand_as(added).flatten(2),
                                                  added.flatten(2), initial_state.flatten(1),
                                                  /*reverse=*/false, cu_chunks_);
    const at::Tensor after = states.view_as(added);
    const at::Tensor before =
        cu_chunks_ ? at::cat({initial_state.unsqueeze(0), after}, 1).index_select(1, before_)
                   : at::cat({initial_state.unsqueeze(1), after.narrow(1, 0, count_ - 1)}, 1);
    return {before, last.view_as(initial_state)};
  }

 private:
  std::int64_t batch_, time_, steps_ = 1, count_ = 0;
  bool reverse_;
  // Of packed sequences: their chunks, the place of every step among those of chunks, and which of
  // the initial states and the states after chunks are those before chunks.
  OptionalTensor cu_chunks_;
  at::Tensor places_, before_;
};

Definition::Results chunks_computed(const std::vector<at::Tensor>& sequences,
                                    const at::Tensor& initial_state,
                                    const OptionalTensor& cu_seqlens, std::int64_t chunk,
                                    bool reverse, c10::string_view map) {
  const Turned in =
      turned(sequences[0], sequences[1], sequences[2], sequences[3], /*reverse=*/false);
  const Chunks chunks(in.q, chunk, reverse, cu_seqlens);
  const at::Tensor k = chunks.cut(features(in.k, map), 0), v = chunks.cut(in.v, 0);
  const at::Tensor a = chunks.cut(in.a, 1);
  const at::Tensor queries = by_head(chunks.cut(features(in.q, map), 0)), values = by_head(v);
  const auto [before, last] = chunks.states(chunks.by_chunk(state_after(k, v, a, {})),
                                            chunks.by_chunk(decay_of(a)), initial_state);
  const at::Tensor inside = at::matmul(scores_inside(queries, by_head(k), a), values);
  const at::Tensor across =
      scores_of(queries * by_head(products_to(a)), before.flatten(0, 1).transpose(-1, -2));
  const at::Tensor y = chunks.joined((inside + across).transpose(1, 2));
  return {y.to(sequences[2].scalar_type()), last, before};
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
                  const std::vector<at::Tensor>& sequences, const at::Tensor& initial_state,
                  const OptionalTensor& cu_seqlens) {
                return chunks_computed(sequences, initial_state, cu_seqlens, chunk, reverse, map);
              },
          .like = 2,
          .sizes = {heads, keys, values},
          .dtype = a.scalar_type(),
          .reverse = reverse,
          .block = chunk,
          .width = heads * numbers / chunk,
          .takes_packed = true};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("_chunked_gate_loop", chunked_gate_loop_composite);
  m.impl("_chunked_gate_loop_forward", chunked_gate_loop_forward_composite);
  m.impl("_chunked_gate_loop_backward", chunked_gate_loop_backward_composite);
}

}  // namespace gateloop::ops
