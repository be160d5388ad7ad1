#pragma once

/// The recurrence in torch's operators, without gradients of its own.
#include <ATen/ATen.h>

namespace gateloop::ops {

/// h_t = a_t h_{t-1} + x_t into h; a, x, h: (B, T, D), h may be x. Returns the state after the last
/// step, (B, D) in the dtype of initial_state (B, D). Everything is accumulated in that dtype.
at::Tensor blocked_scan(const at::Tensor& a, const at::Tensor& x, const at::Tensor& initial_state,
                        bool reverse, const at::Tensor& h);

}  // namespace gateloop::ops
