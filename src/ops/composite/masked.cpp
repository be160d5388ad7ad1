#include "ops/masked.h"

#include "gateloop/ops.h"
#include "ops/checks.h"

namespace gateloop::ops {

// Every sequence is filled, and the output too: padding may hold NaN, in either direction, and zero
// times that is NaN.

at::Tensor Padding::along(const at::Tensor& sequence) const {
  at::Tensor padding = padding_;
  while (padding.dim() < sequence.dim()) padding = padding.unsqueeze(-1);
  return padding;
}

at::Tensor Padding::filled(const at::Tensor& sequence, const at::Scalar& value) const {
  return sequence.masked_fill(along(sequence), value);
}

at::Tensor Padding::held(const at::Tensor& z) const {
  const at::Tensor pair =
      at::cat({at::full({1}, kHoldingGate, z.options()), at::zeros({1}, z.options())});
  return at::where(along(z), pair.repeat_symint({z.sym_size(2) / 2}), z);
}

std::tuple<at::Tensor, at::Tensor> linear_recurrence_masked(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const at::Tensor& mask) {
  check_linear_recurrence(a, x, initial_state, cu_seqlens);
  check_mask("gateloop::linear_recurrence", "x", x, mask, cu_seqlens);
  const Padding padding(mask);
  const auto [h, final_state] =
      linear_recurrence(padding.filled(a, 1), padding.filled(x), initial_state, reverse);
  return {padding.filled(h), final_state};
}

std::tuple<at::Tensor, at::Tensor> polar_gate_loop_masked(const at::Tensor& q, const at::Tensor& k,
                                                          const at::Tensor& v, const at::Tensor& z,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens,
                                                          const at::Tensor& mask) {
  check_polar_gate_loop(q, k, v, z, initial_state, cu_seqlens);
  check_mask("gateloop::polar_gate_loop", "q", q, mask, cu_seqlens);
  const Padding padding(mask);
  const auto [y, final_state] =
      polar_gate_loop(padding.filled(q), padding.filled(k), padding.filled(v), padding.held(z),
                      initial_state, reverse);
  return {padding.filled(y), final_state};
}

std::tuple<at::Tensor, at::Tensor> simple_gate_loop_masked(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, const at::Tensor& mask) {
  check_simple_gate_loop(q, kv, z, initial_state, cu_seqlens);
  check_mask("gateloop::simple_gate_loop", "q", q, mask, cu_seqlens);
  const Padding padding(mask);
  const auto [y, final_state] =
      simple_gate_loop(padding.filled(q), padding.filled(kv), padding.filled(z, kHoldingGate),
                       initial_state, reverse, normalize_input);
  return {padding.filled(y), final_state};
}

}  // namespace gateloop::ops
