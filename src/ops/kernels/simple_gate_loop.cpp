#include <torch/library.h>

#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/kernels/executor.h"
#include "ops/masked.h"
#include "ops/meta/shapes.h"
#include "ops/offsets.h"

namespace gateloop::ops {
namespace {

/// `saved_states`: (B, blocks, D), or undefined where no backward pass follows.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& kv,
                                           const at::Tensor& z, const OptionalTensor& initial_state,
                                           bool reverse, bool normalize_input,
                                           const OptionalTensor& cu_seqlens,
                                           const at::Tensor& saved_states) {
  const at::Tensor offsets = kernel_offsets("gateloop::simple_gate_loop", cu_seqlens, q);
  const at::Tensor q_ = with_contiguous_channels(q);
  const at::Tensor kv_ = with_contiguous_channels(kv);
  const at::Tensor z_ = with_contiguous_channels(z);
  const at::Tensor initial = contiguous(initial_state);
  at::Tensor y = empty_sequence(q.sizes(), q.options());
  at::Tensor final_state = empty_state(q, accumulation_type(q.scalar_type()), cu_seqlens);

  run_kernel(
      recurrence::SimpleGateLoop{
          .dtype = kernel_dtype(q.scalar_type()),
          .shape = kernel_shape(q),
          .reverse = reverse,
          .normalize_input = normalize_input,
          .q = input(q_),
          .kv = input(kv_),
          .z = input(z_),
          .initial_state = state_input(initial),
          .y = output(y),
          .final_state = final_state.mutable_data_ptr(),
          .saved_states = saved_states.defined() ? saved_states.mutable_data_ptr() : nullptr,
          .offsets = as_offsets(offsets)},
      q.device());
  return {y, final_state};
}

std::tuple<at::Tensor, at::Tensor> simple_gate_loop_kernel(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return simple_gate_loop_masked(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens,
                                   *mask);
  }
  check_simple_gate_loop(q, kv, z, initial_state, cu_seqlens);
  return forward(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens, {});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_forward_kernel(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens) {
  check_simple_gate_loop(q, kv, z, initial_state, cu_seqlens);
  at::Tensor saved_states = empty_saved_states(q, accumulation_type(q.scalar_type()), cu_seqlens);
  auto [y, final_state] =
      forward(q, kv, z, initial_state, reverse, normalize_input, cu_seqlens, saved_states);
  return {y, final_state, saved_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_backward_kernel(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& kv, const at::Tensor& z, const at::Tensor& saved_states, bool reverse,
    bool normalize_input, const OptionalTensor& cu_seqlens) {
  check_simple_gate_loop_backward(dy, dfinal_state, q, kv, z, saved_states, cu_seqlens);
  const at::Tensor offsets = kernel_offsets("gateloop::_simple_gate_loop_backward", cu_seqlens, q);
  const at::Tensor q_ = with_contiguous_channels(q);
  const at::Tensor kv_ = with_contiguous_channels(kv);
  const at::Tensor z_ = with_contiguous_channels(z);
  const at::Tensor dy_ = with_contiguous_channels(dy);
  const at::Tensor dfinal = contiguous(dfinal_state), saved = contiguous(saved_states);
  at::Tensor dq = empty_sequence(q.sizes(), q.options());
  at::Tensor dkv = empty_sequence(q.sizes(), q.options());
  at::Tensor dz = empty_sequence(q.sizes(), q.options());
  at::Tensor dinitial = empty_state(q, saved_states.scalar_type(), cu_seqlens);

  run_kernel(recurrence::SimpleGateLoopBackward{.dtype = kernel_dtype(q.scalar_type()),
                                                .shape = kernel_shape(q),
                                                .reverse = reverse,
                                                .normalize_input = normalize_input,
                                                .q = input(q_),
                                                .kv = input(kv_),
                                                .z = input(z_),
                                                .dy = input(dy_),
                                                .saved_states = saved.const_data_ptr(),
                                                .dfinal_state = state_input(dfinal),
                                                .dq = output(dq),
                                                .dkv = output(dkv),
                                                .dz = output(dz),
                                                .dinitial_state = dinitial.mutable_data_ptr(),
                                                .offsets = as_offsets(offsets)},
             q.device());
  return {dq, dkv, dz, dinitial};
}

void register_simple_gate_loop(torch::Library& m) {
  m.impl("simple_gate_loop", simple_gate_loop_kernel);
  m.impl("_simple_gate_loop_forward", simple_gate_loop_forward_kernel);
  m.impl("_simple_gate_loop_backward", simple_gate_loop_backward_kernel);
}

}  // namespace

GATELOOP_REGISTER_KERNELS(register_simple_gate_loop)

}  // namespace gateloop::ops
