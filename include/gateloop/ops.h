#pragma once

/// The torch operators of GateLoop, called through the dispatcher (autograd, autocast and meta
/// tensors included). The same operators are torch.ops.gateloop.* in Python once
/// libgateloop_ops.so is loaded.
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace gateloop {

// Sequences of different lengths, where an operator takes these arguments; at most one of them:
//
// cu_seqlens: (N + 1), int32 or int64, on the CPU or on the sequences' device: where N sequences,
//             packed along the time of a batch of one, begin and end: 0, then the end of each; the
//             last number is T. On CUDA wrong numbers end as wrong indices do, in a failed
//             assertion. Sequences may be empty. Each has a state of its own: initial_state and
//             final_state are (N, D).
// mask:       (B, T), bool, false at padding. A step of padding neither decays nor feeds the state.
//             Whatever it holds, the output there is 0 and no gradient flows from it or to it.

/// h_t = a_t h_{t-1} + x_t.
///
/// a, x:          (B, T, D), one dtype: float32, float64, complex64, complex128, bfloat16, float16.
///                Read through their strides; only the channels are made contiguous if they are
///                not.
/// initial_state: (B, D); float32 for bfloat16 and float16 sequences, else the dtype of x.
/// reverse:       scan from the last step to the first.
/// Returns (h (B, T, D) in the dtype of x, final_state (B, D) in the dtype of the state).
/// Throws c10::Error naming the op and the argument.
std::tuple<at::Tensor, at::Tensor> linear_recurrence(
    const at::Tensor& a, const at::Tensor& x,
    const std::optional<at::Tensor>& initial_state = std::nullopt, bool reverse = false,
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt);

/// The GateLoop operator, S_t = a_t S_{t-1} + k_t^T v_t and y_t = q_t Re(S_t) (arXiv 2311.01927,
/// section 3.2). One channel per head (max heads, the paper's setting), or heads wider than that.
///
/// q, k:          (B, T, D), or (B, T, H, K) for heads of K channels; float32, float64, bfloat16 or
///                float16.
/// v:             (B, T, D), or (B, T, H, V); the dtype of q.
/// a:             (B, T, D); or (B, T, H), one transition per head, or (B, T, H, K), one per key;
///                complex64 or float32, with float64 sequences complex128 or float64.
/// initial_state: (B, D), or (B, H, K, V), in the dtype of a.
/// form:          scan: linear in T, what auto takes; a backward pass keeps one state in 64 steps
///                (16 with a transition a key). attention: the surrogate attention of section 3.3
///                in tiles, T² work. recurrent: step by step; a backward pass keeps one state in √T
///                steps. All compute the same, and their gradients too. In scan and attention an
///                infinity or NaN of heads may make outputs of earlier steps NaN, 0 · ∞ where they
///                are masked; in scan outputs of up to 15 steps before it on the CPU.
/// feature_map:   taylor: of heads, with transitions a head: φ(q) and φ(k) in place of q and k
///                (arXiv 2312.04927). Their products are 1 + s + s²/2 with s = q · k. States have 1
///                + K + K (K + 1) / 2 keys. Features of all T are in memory under create_graph, in
///                forward mode and in torch.func's derivatives alone.
/// Returns (y (B, T, D) or (B, T, H, V) in the dtype of q, final_state as initial_state is).
std::tuple<at::Tensor, at::Tensor> gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const std::optional<at::Tensor>& initial_state = std::nullopt, bool reverse = false,
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt, c10::string_view form = "auto",
    c10::string_view feature_map = "none");

/// One step of gate_loop. q, k, v, a as there without T, state: (B, D) or (B, H, K, V) in the dtype
/// of a, and feature_map. Returns (y, the next state).
std::tuple<at::Tensor, at::Tensor> gate_loop_step(const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& a,
                                                  const at::Tensor& state,
                                                  c10::string_view feature_map = "none");

/// gate_loop with max heads from the raw transition: a = σ(|z|) z/|z|, all in one pass.
///
/// q, k, v:       (B, T, D), one dtype: float32, float64, bfloat16 or float16.
/// z:             (B, T, 2 D) in the same dtype, (re, im) interleaved per channel.
/// initial_state: (B, D), complex64 (complex128 for float64 sequences).
/// Returns (y (B, T, D), final_state (B, D) complex).
std::tuple<at::Tensor, at::Tensor> polar_gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const std::optional<at::Tensor>& initial_state = std::nullopt, bool reverse = false,
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt);

/// The simple gate: a = σ(z), h = a h + x, y = q h, where x is kv, or (1 - a) kv with
/// normalize_input.
///
/// q, kv, z:      (B, T, D), one dtype: float32, float64, bfloat16 or float16.
/// initial_state: (B, D), float32 (float64 for float64 sequences).
/// Returns (y (B, T, D), final_state (B, D)).
std::tuple<at::Tensor, at::Tensor> simple_gate_loop(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const std::optional<at::Tensor>& initial_state = std::nullopt, bool reverse = false,
    bool normalize_input = false, const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt);

}  // namespace gateloop
