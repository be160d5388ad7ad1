#include <torch/library.h>

#include "gateloop/ops.h"
#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/composite/definition.h"
#include "ops/composite/stand_in.h"
#include "ops/internal.h"
#include "ops/masked.h"
#include "ops/meta/shapes.h"

namespace gateloop::ops {

Definition simple_gate_loop_definition(const at::Tensor& q, bool reverse, bool normalize_input) {
  const auto real = accumulation_type(q.scalar_type());
  const auto compute = [real, reverse, normalize_input](
                           const std::vector<at::Tensor>& in, const at::Tensor& initial_state,
                           const OptionalTensor& cu_seqlens) -> Definition::Results {
    const at::Tensor &q = in[0], raw = in[2].to(real);
    at::Tensor x = in[1].to(real);
    // 1 - σ(z) = σ(-z), without the cancellation near 1.
    if (normalize_input) x = x * raw.neg().sigmoid();
    const auto [h, final_state] =
        linear_recurrence(raw.sigmoid(), x, initial_state, reverse, cu_seqlens);
    return {
        (q.to(real) * h).to(q.scalar_type()), final_state,
        states_before_blocks(h, initial_state, recurrence::kSavedStateBlock, reverse, cu_seqlens)};
  };
  return {.op = "gateloop::simple_gate_loop",
          .compute = compute,
          .sizes = {q.size(2)},
          .dtype = real,
          .reverse = reverse,
          .block = recurrence::kSavedStateBlock,
          .width = q.size(2),
          .takes_packed = true};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_in_spans(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, bool save) {
  check_simple_gate_loop(q, kv, z, initial_state, cu_seqlens);
  warn_of_missing_kernels(q);
  const auto definition = simple_gate_loop_definition(q, reverse, normalize_input);
  const Definition::Results outputs{
      empty_sequence(q), empty_state(q, definition.dtype, cu_seqlens),
      save ? empty_saved_states(q, definition.dtype, cu_seqlens) : at::Tensor()};
  compute_in_spans(definition, {q, kv, z}, initial_state, cu_seqlens, outputs);
  return {outputs.y, outputs.final_state, outputs.states};
}

std::tuple<at::Tensor, at::Tensor> simple_gate_loop_composite(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return simple_gate_loop_masked(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens,
                                   *mask);
  }
  auto [y, final_state, none] = simple_gate_loop_in_spans(
      q, kv, z, initial_state, reverse, normalize_input, cu_seqlens, /*save=*/false);
  return {y, final_state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_forward_composite(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens) {
  return simple_gate_loop_in_spans(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens,
                                   /*save=*/true);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_backward_composite(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& kv, const at::Tensor& z, const at::Tensor& saved_states, bool reverse,
    bool normalize_input, const OptionalTensor& cu_seqlens) {
  check_simple_gate_loop_backward(dy, dfinal_state, q, kv, z, saved_states, cu_seqlens);
  const at::Tensor dq = empty_sequence(q), dkv = empty_sequence(kv), dz = empty_sequence(z);
  const at::Tensor dinitial = empty_state(q, saved_states.scalar_type(), cu_seqlens);
  differentiate_in_spans("gateloop::_simple_gate_loop_backward",
                         simple_gate_loop_definition(q, reverse, normalize_input), {q, kv, z},
                         saved_states, dy, dfinal_state, cu_seqlens, {dq, dkv, dz, dinitial});
  return {dq, dkv, dz, dinitial};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("simple_gate_loop", simple_gate_loop_composite);
  m.impl("_simple_gate_loop_forward", simple_gate_loop_forward_composite);
  m.impl("_simple_gate_loop_backward", simple_gate_loop_backward_composite);
}

}  // namespace gateloop::ops
