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
namespace {

/// σ(|z|) z/|z| of z (B, T, 2 D). By sgn(), whose derivative along z is zero to the bit where z is
/// real: that of a quotient rounds to a multiple of 1/|z|.
at::Tensor polar_gate(const at::Tensor& z) {
  const at::Tensor pairs = at::view_as_complex(z.contiguous().unflatten(2, {-1, 2}));
  // At z = 0 the direction is undefined: there a = 0.5 and no gradient flows, nor a second one.
  const at::Tensor at_zero = pairs == 0, safe = pairs.masked_fill(at_zero, 1);
  const at::Tensor a = at::view_as_real(safe.sgn()) * safe.abs().sigmoid().unsqueeze(-1);
  return at::view_as_complex(a).masked_fill(at_zero, 0.5);
}

}  // namespace

Definition polar_gate_loop_definition(const at::Tensor& q, bool reverse) {
  const auto real = accumulation_type(q.scalar_type());
  const auto compute = [real, reverse](const std::vector<at::Tensor>& in,
                                       const at::Tensor& initial_state,
                                       const OptionalTensor& cu_seqlens) -> Definition::Results {
    const at::Tensor &q = in[0], &k = in[1], &v = in[2], &z = in[3];
    const at::Tensor a = polar_gate(z.to(real));
    const at::Tensor kv = (k.to(real) * v.to(real)).to(a.scalar_type());
    const auto [h, final_state] = linear_recurrence(a, kv, initial_state, reverse, cu_seqlens);
    return {
        (q.to(real) * at::real(h)).to(q.scalar_type()), final_state,
        states_before_blocks(h, initial_state, recurrence::kSavedStateBlock, reverse, cu_seqlens)};
  };
  return {.op = "gateloop::polar_gate_loop",
          .compute = compute,
          .sizes = {q.size(2)},
          .dtype = at::toComplexType(real),
          .reverse = reverse,
          .block = recurrence::kSavedStateBlock,
          .width = q.size(2),
          .takes_packed = true};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> polar_gate_loop_in_spans(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    bool save) {
  check_polar_gate_loop(q, k, v, z, initial_state, cu_seqlens);
  warn_of_missing_kernels(q);
  const auto definition = polar_gate_loop_definition(q, reverse);
  const Definition::Results outputs{
      empty_sequence(q), empty_state(q, definition.dtype, cu_seqlens),
      save ? empty_saved_states(q, definition.dtype, cu_seqlens) : at::Tensor()};
  compute_in_spans(definition, {q, k, v, z}, initial_state, cu_seqlens, outputs);
  return {outputs.y, outputs.final_state, outputs.states};
}

std::tuple<at::Tensor, at::Tensor> polar_gate_loop_composite(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask) {
  if (is_given(mask)) {
    return polar_gate_loop_masked(q, k, v, z, initial_state, reverse, cu_seqlens, *mask);
  }
  auto [y, final_state, none] =
      polar_gate_loop_in_spans(q, k, v, z, initial_state, reverse, cu_seqlens, /*save=*/false);
  return {y, final_state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> polar_gate_loop_forward_composite(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens) {
  return polar_gate_loop_in_spans(q, k, v, z, initial_state, reverse, cu_seqlens, /*save=*/true);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
polar_gate_loop_backward_composite(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                   const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& z, const at::Tensor& saved_states,
                                   bool reverse, const OptionalTensor& cu_seqlens) {
  check_polar_gate_loop_backward(dy, dfinal_state, q, k, v, z, saved_states, cu_seqlens);
  const at::Tensor dq = empty_sequence(q), dk = empty_sequence(k), dv = empty_sequence(v);
  const at::Tensor dz = empty_sequence(z);
  const at::Tensor dinitial = empty_state(q, saved_states.scalar_type(), cu_seqlens);
  differentiate_in_spans("gateloop::_polar_gate_loop_backward",
                         polar_gate_loop_definition(q, reverse), {q, k, v, z}, saved_states, dy,
                         dfinal_state, cu_seqlens, {dq, dk, dv, dz, dinitial});
  return {dq, dk, dv, dz, dinitial};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("polar_gate_loop", polar_gate_loop_composite);
  m.impl("_polar_gate_loop_forward", polar_gate_loop_forward_composite);
  m.impl("_polar_gate_loop_backward", polar_gate_loop_backward_composite);
}

}  // namespace gateloop::ops
