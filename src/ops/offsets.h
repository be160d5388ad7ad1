#pragma once

#include <cstdint>
#include <vector>

#include "gateloop/recurrence.h"
#include "ops/internal.h"

namespace gateloop::ops {

/// cu_seqlens (N + 1) as the host reads it, empty where absent; waits for the device that holds it.
/// Throws c10::Error naming `op` for values that do not cut `time` steps into sequences.
std::vector<std::int64_t> sequence_offsets(const char* op, const OptionalTensor& cu_seqlens,
                                           std::int64_t time);

/// The same for a kernel that runs where `sequence` (1, T, ...) is: int64, contiguous, there;
/// undefined where absent. From the CPU they are copied, which waits and cannot be in a graph.
/// Values that lie on another device than the CPU are checked there, by torch's _assert_async:
/// nothing waits, and wrong ones end the use of the device.
at::Tensor kernel_offsets(const char* op, const OptionalTensor& cu_seqlens,
                          const at::Tensor& sequence);
/// As the kernels take it. The tensor must outlive it.
recurrence::Offsets as_offsets(const at::Tensor& kernel_offsets);

}  // namespace gateloop::ops
