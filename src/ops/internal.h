#pragma once

/// Operators behind the public ones: forwards that keep what a backward needs, and the backwards.
/// Schemas stand in <op>.cpp, kernels in the folder of their dispatch key. Undefined optional
/// tensors read as zeros.
#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <tuple>

namespace gateloop::ops {

using OptionalTensor = std::optional<at::Tensor>;

inline bool is_given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

/// Transitions of gate_loop as wide as its states: autocast may have made them narrower.
inline at::Tensor as_wide_as_states(const at::Tensor& a) {
  return at::isReducedFloatingType(a.scalar_type()) ? a.to(at::kFloat) : a;
}

/// gate_loop of max heads around a recurrence of a and kv (B, T, D). `recurrence` returns the
/// states and the last of them.
std::tuple<at::Tensor, at::Tensor> gate_loop_around(
    const std::function<std::tuple<at::Tensor, at::Tensor>(const at::Tensor& kv)>& recurrence,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a);
/// gate_loop of max heads in torch's operators and the linear recurrence. Each of these has a
/// gradient and a batching rule.
std::tuple<at::Tensor, at::Tensor> gate_loop_by_linear_recurrence(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens);

// With the feature map "taylor" states of wide heads have the features of K as keys.

/// gate_loop of wide heads as surrogate attention, in tiles: memory is linear in T.
std::tuple<at::Tensor, at::Tensor> attention_gate_loop(const at::Tensor& q, const at::Tensor& k,
                                                       const at::Tensor& v, const at::Tensor& a,
                                                       const OptionalTensor& initial_state,
                                                       bool reverse, c10::string_view feature_map);
/// One step of wide heads, q, k: (B, H, K), v: (B, H, V), a: (B, H[, K]); and one after another.
std::tuple<at::Tensor, at::Tensor> gate_loop_step(const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& a,
                                                  const at::Tensor& state);
std::tuple<at::Tensor, at::Tensor> gate_loop_by_steps(const at::Tensor& q, const at::Tensor& k,
                                                      const at::Tensor& v, const at::Tensor& a,
                                                      const OptionalTensor& initial_state,
                                                      bool reverse, c10::string_view feature_map);

/// gate_loop of wide heads in chunks of time. -> (y (B, T, H, V), final_state (B or N, H, K, V)).
std::tuple<at::Tensor, at::Tensor> chunked_gate_loop(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& v, const at::Tensor& a,
                                                     const OptionalTensor& initial_state,
                                                     bool reverse, const OptionalTensor& cu_seqlens,
                                                     c10::string_view feature_map);
/// The same and saved_states (B, chunks, H, 1 or 2, K, V), real: the states before each chunk.
std::tuple<at::Tensor, at::Tensor, at::Tensor> chunked_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map);
/// -> (dq, dk, dv, da as their arguments, dinitial_state (B or N, H, K, V)).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> chunked_gate_loop_backward(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& a, const at::Tensor& saved_states,
    bool reverse, const OptionalTensor& cu_seqlens, c10::string_view feature_map);

/// -> (da, dx (B, T, D), dinitial_state (B, D)); h is the forward's output. Here and below states
/// are (N, D) beside cu_seqlens (N + 1), and there are saved_state_count(T, N) saved ones.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_recurrence_backward(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens);

/// The same in torch's operators, differentiable any number of times.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_recurrence_backward_composite(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens);

/// Results and their tangents, of inputs of which one or more carry a tangent.
std::tuple<at::Tensor, at::Tensor> linear_recurrence_dual(const at::Tensor& a, const at::Tensor& x,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens);

/// -> (y (B, T, D), final_state (B, D), saved_states (B, blocks, D)).
std::tuple<at::Tensor, at::Tensor, at::Tensor> polar_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens);

/// -> (dq, dk, dv (B, T, D), dz (B, T, 2 D), dinitial_state (B, D)).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> polar_gate_loop_backward(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& z, const at::Tensor& saved_states,
    bool reverse, const OptionalTensor& cu_seqlens);

/// -> (y (B, T, D), final_state (B, D), saved_states (B, blocks, D)).
std::tuple<at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens);

/// -> (dq, dkv, dz (B, T, D), dinitial_state (B, D)).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> simple_gate_loop_backward(
    const OptionalTensor& dy, const OptionalTensor& dfinal_state, const at::Tensor& q,
    const at::Tensor& kv, const at::Tensor& z, const at::Tensor& saved_states, bool reverse,
    bool normalize_input, const OptionalTensor& cu_seqlens);

}  // namespace gateloop::ops
