#include <torch/library.h>

#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/kernels/executor.h"
#include "ops/meta/shapes.h"
#include "ops/offsets.h"

namespace gateloop::ops {
namespace {

recurrence::HeadsShape heads_shape(const at::Tensor& q, const at::Tensor& v) {
  return {q.size(0), q.size(1), q.size(2), q.size(3), v.size(3)};
}

recurrence::ConstHeads heads_input(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}
recurrence::Heads heads_output(const at::Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

/// (B, T, H) with any strides, (B, T, H, K) with contiguous keys.
at::Tensor transitions_input(const at::Tensor& a) {
  return a.dim() == 4 ? with_contiguous_channels(a) : a.resolve_conj().resolve_neg();
}

/// `saved_states`: undefined where no backward pass follows.
std::tuple<at::Tensor, at::Tensor> run_chunks(const at::Tensor& q, const at::Tensor& k,
                                              const at::Tensor& v, const at::Tensor& a,
                                              const OptionalTensor& initial_state, bool reverse,
                                              const OptionalTensor& cu_seqlens,
                                              recurrence::FeatureMap map,
                                              const at::Tensor& saved_states) {
  const at::Tensor q_ = with_contiguous_channels(q);
  const at::Tensor k_ = with_contiguous_channels(k);
  const at::Tensor v_ = with_contiguous_channels(v);
  const at::Tensor a_ = transitions_input(a);
  const at::Tensor initial = contiguous(initial_state);
  const at::Tensor offsets = kernel_offsets("gateloop::gate_loop", cu_seqlens, q);
  const auto shape = heads_shape(q, v);
  at::Tensor y = empty_sequence(v.sizes(), v.options());
  at::Tensor final_state = empty_head_state(q, v, a, cu_seqlens, map);

  run_kernel(
      recurrence::GateLoop{
          .dtype = kernel_dtype(q.scalar_type()),
          .shape = shape,
          .complex = a.is_complex(),
          .per_key = a.dim() == 4,
          .feature_map = map,
          .reverse = reverse,
          .q = heads_input(q_),
          .k = heads_input(k_),
          .v = heads_input(v_),
          .a = heads_input(a_),
          .initial_state = state_input(initial),
          .y = heads_output(y),
          .final_state = final_state.mutable_data_ptr(),
          .saved_states = saved_states.defined() ? saved_states.mutable_data_ptr() : nullptr,
          .offsets = as_offsets(offsets)},
      q.device());
  return {y, final_state};
}

std::tuple<at::Tensor, at::Tensor> chunked_gate_loop_kernel(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  const auto map = feature_map_of(kChunkedGateLoop, feature_map);
  check_wide_gate_loop(kChunkedGateLoop, q, k, v, a, initial_state, cu_seqlens, map);
  return run_chunks(q, k, v, a, initial_state, reverse, cu_seqlens, map, {});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_gate_loop_forward_kernel(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  const auto map = feature_map_of(kChunkedGateLoop, feature_map);
  check_wide_gate_loop(kChunkedGateLoop, q, k, v, a, initial_state, cu_seqlens, map);
  const at::Tensor saved_states = empty_saved_chunks(q, v, a, cu_seqlens, map);
  auto [y, final_state] =
      run_chunks(q, k, v, a, initial_state, reverse, cu_seqlens, map, saved_states);
  return {y, final_state, saved_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
chunked_gate_loop_backward_kernel(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                  const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                  const at::Tensor& a, const at::Tensor& saved_states, bool reverse,
                                  const OptionalTensor& cu_seqlens, c10::string_view feature_map) {
  const auto map = feature_map_of("gateloop::_chunked_gate_loop_backward", feature_map);
  check_chunked_gate_loop_backward(dy, dfinal_state, q, k, v, a, saved_states, cu_seqlens, map);
  const at::Tensor offsets = kernel_offsets("gateloop::_chunked_gate_loop_backward", cu_seqlens, q);
  const at::Tensor q_ = with_contiguous_channels(q);
  const at::Tensor k_ = with_contiguous_channels(k);
  const at::Tensor v_ = with_contiguous_channels(v);
  const at::Tensor a_ = transitions_input(a);
  const at::Tensor dy_ = with_contiguous_channels(dy);
  const at::Tensor dfinal = contiguous(dfinal_state);
  const at::Tensor saved = contiguous(saved_states);
  const auto shape = heads_shape(q, v);
  at::Tensor dq = empty_sequence(q.sizes(), q.options());
  at::Tensor dk = empty_sequence(k.sizes(), k.options());
  at::Tensor dv = empty_sequence(v.sizes(), v.options());
  at::Tensor da = at::empty(a.sizes(), a.options());
  at::Tensor dinitial = empty_head_state(q, v, a, cu_seqlens, map);

  run_kernel(recurrence::GateLoopBackward{.dtype = kernel_dtype(q.scalar_type()),
                                          .shape = shape,
                                          .complex = a.is_complex(),
                                          .per_key = a.dim() == 4,
                                          .feature_map = map,
                                          .reverse = reverse,
                                          .q = heads_input(q_),
                                          .k = heads_input(k_),
                                          .v = heads_input(v_),
                                          .a = heads_input(a_),
                                          .dy = heads_input(dy_),
                                          .saved_states = saved.const_data_ptr(),
                                          .dfinal_state = state_input(dfinal),
                                          .dq = heads_output(dq),
                                          .dk = heads_output(dk),
                                          .dv = heads_output(dv),
                                          .da = heads_output(da),
                                          .dinitial_state = dinitial.mutable_data_ptr(),
                                          .offsets = as_offsets(offsets)},
             q.device());
  return {dq, dk, dv, da, dinitial};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, CPU, m) {
  m.impl("_chunked_gate_loop", chunked_gate_loop_kernel);
  m.impl("_chunked_gate_loop_forward", chunked_gate_loop_forward_kernel);
  m.impl("_chunked_gate_loop_backward", chunked_gate_loop_backward_kernel);
}

}  // namespace gateloop::ops
