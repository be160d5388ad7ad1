#pragma once

/// The recurrence in torch's operators, without gradients of its own.
#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace gateloop::ops {

/// h_t = a_t h_{t-1} + x_t into h; a, x, h: (B, T, D), h may be x. Returns the state after the last
/// step, (B, D) in the dtype of initial_state (B, D). Everything is accumulated in that dtype.
at::Tensor blocked_scan(const at::Tensor& a, const at::Tensor& x, const at::Tensor& initial_state,
                        bool reverse, const at::Tensor& h);

/// The same of N sequences side by side in time, a, x, h: (1, T, D); sequence n has the steps from
/// offsets[n] to offsets[n + 1]. initial_states and result: (N, D). No number of one sequence
/// enters another, not even multiplied by zero.
at::Tensor packed_scan(const at::Tensor& a, const at::Tensor& x, const at::Tensor& initial_states,
                       const std::vector<std::int64_t>& offsets, bool reverse, const at::Tensor& h);

}  // namespace gateloop::ops
