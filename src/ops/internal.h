#pragma once

/// Operators behind the public ones: forwards that keep what a backward needs, and the backwards.
/// Schemas stand in <op>.cpp, kernels in the folder of their dispatch key. Undefined optional
/// tensors read as zeros.
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace gateloop::ops {

using OptionalTensor = std::optional<at::Tensor>;

inline bool is_given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

/// gate_loop in torch's operators and the linear recurrence, of which each has a gradient and a
/// batching rule.
std::tuple<at::Tensor, at::Tensor> gate_loop_by_linear_recurrence(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse);

/// gate_loop that holds its arguments until the backward pass, which computes the (B, T, H, K, V)
/// states of wide heads again.
std::tuple<at::Tensor, at::Tensor> gate_loop_recomputed(const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& a,
                                                        const OptionalTensor& initial_state,
                                                        bool reverse);

/// -> (da, dx (B, T, D), dinitial_state (B, D)); h is the forward's output. Here and below states
/// are (N, D) beside cu_seqlens (N + 1), and there are saved_state_count(T, N) saved ones.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_recurrence_backward(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool reverse,
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
