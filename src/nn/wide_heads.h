#pragma once

/// The GateLoop recurrence for a head dimension d above one.
#include <torch/torch.h>

#include <optional>
#include <utility>

namespace gateloop::nn {

/// S_t = a_t S_{t-1} + k_t^T v_t,  y_t = q_t Re(S_t)   (arXiv 2311.01927, section 3.2).
///
/// q, k, v: (B, T, H, d) real; a: (B, T, H), complex or real, float32 or float64.
/// initial_state: (B, H, d, d) in the dtype of a, or none.
/// recompute: hold q, k, v, a instead of the (B, T, H, d, d) states until the backward pass.
/// Returns (y (B, T, H, d) in the real dtype of a, final state (B, H, d, d), detached).
std::pair<torch::Tensor, torch::Tensor> wide_heads_read(
    const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v, const torch::Tensor& a,
    const std::optional<torch::Tensor>& initial_state, bool recompute);

}  // namespace gateloop::nn
