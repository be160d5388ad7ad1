#pragma once

#include <ATen/ATen.h>

namespace gateloop::ops {

/// A dense tensor, uninitialised; on the CPU large ones in memory that host::MemoryPool keeps for
/// the next.
at::Tensor empty_pooled(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace gateloop::ops
