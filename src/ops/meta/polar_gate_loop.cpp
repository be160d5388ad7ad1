#include <torch/library.h>

#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/masked.h"
#include "ops/meta/shapes.h"

namespace gateloop::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> polar_gate_loop_meta(const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& z,
                                                        const OptionalTensor& initial_state,
                                                        bool reverse,
                                                        const OptionalTensor& cu_seqlens,
                                                        const OptionalTensor& mask) {
  if (is_given(mask)) {
    return polar_gate_loop_masked(q, k, v, z, initial_state, reverse, cu_seqlens, *mask);
  }
  check_polar_gate_loop(q, k, v, z, initial_state, cu_seqlens);
  return {empty_sequence(q),
          empty_state(q, complex_accumulation_type(q.scalar_type()), cu_seqlens)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> polar_gate_loop_forward_meta(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool /*reverse*/, const OptionalTensor& cu_seqlens) {
  check_polar_gate_loop(q, k, v, z, initial_state, cu_seqlens);
  const auto state_type = complex_accumulation_type(q.scalar_type());
  return {empty_sequence(q), empty_state(q, state_type, cu_seqlens),
          empty_saved_states(q, state_type, cu_seqlens)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
polar_gate_loop_backward_meta(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                              const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& z, const at::Tensor& saved_states, bool /*reverse*/,
                              const OptionalTensor& cu_seqlens) {
  check_polar_gate_loop_backward(dy, dfinal_state, q, k, v, z, saved_states, cu_seqlens);
  return {empty_sequence(q), empty_sequence(q), empty_sequence(q), empty_sequence(z),
          empty_state(q, complex_accumulation_type(q.scalar_type()), cu_seqlens)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Meta, m) {
  m.impl("polar_gate_loop", polar_gate_loop_meta);
  m.impl("_polar_gate_loop_forward", polar_gate_loop_forward_meta);
  m.impl("_polar_gate_loop_backward", polar_gate_loop_backward_meta);
}

}  // namespace gateloop::ops
