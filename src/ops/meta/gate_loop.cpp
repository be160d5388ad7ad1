#include <torch/library.h>

#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/meta/shapes.h"

namespace gateloop::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> chunked_gate_loop_meta(const at::Tensor& q, const at::Tensor& k,
                                                          const at::Tensor& v, const at::Tensor& a,
                                                          const OptionalTensor& initial_state,
                                                          bool /*reverse*/,
                                                          const OptionalTensor& cu_seqlens,
                                                          c10::string_view feature_map) {
  const auto map = feature_map_of(kChunkedGateLoop, feature_map);
  check_wide_gate_loop(kChunkedGateLoop, q, k, v, a, initial_state, cu_seqlens, map);
  return {empty_sequence(v), empty_head_state(q, v, a, cu_seqlens, map)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_gate_loop_forward_meta(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  const auto map = feature_map_of(kChunkedGateLoop, feature_map);
  auto [y, final_state] =
      chunked_gate_loop_meta(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
  return {y, final_state, empty_saved_chunks(q, v, a, cu_seqlens, map)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
chunked_gate_loop_backward_meta(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& a, const at::Tensor& saved_states,
                                bool /*reverse*/, const OptionalTensor& cu_seqlens,
                                c10::string_view feature_map) {
  const auto map = feature_map_of("gateloop::_chunked_gate_loop_backward", feature_map);
  check_chunked_gate_loop_backward(dy, dfinal_state, q, k, v, a, saved_states, cu_seqlens, map);
  return {empty_sequence(q), empty_sequence(k), empty_sequence(v),
          at::empty_symint(a.sym_sizes(), a.options()), empty_head_state(q, v, a, cu_seqlens, map)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Meta, m) {
  m.impl("_chunked_gate_loop", chunked_gate_loop_meta);
  m.impl("_chunked_gate_loop_forward", chunked_gate_loop_forward_meta);
  m.impl("_chunked_gate_loop_backward", chunked_gate_loop_backward_meta);
}

}  // namespace gateloop::ops
