#pragma once

/// What torch lends the kernels: its threads, its memory, and its tensors as plain structs.
#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "gateloop/recurrence.h"

namespace gateloop::ops {

recurrence::DType kernel_dtype(at::ScalarType dtype);

/// torch's threads, or one inside of a parallel region.
recurrence::Executor torch_threads();

/// Sizes of a (B, T, D) tensor.
recurrence::Shape kernel_shape(const at::Tensor& sequence);

/// The tensor itself where its channels are contiguous, with any stride before them; a
/// contiguous copy elsewhere. Undefined where absent.
at::Tensor with_contiguous_channels(const std::optional<at::Tensor>& sequence);

/// Views for the kernels. The tensors must outlive them. An undefined tensor gives null pointers.
recurrence::ConstSequence input(const at::Tensor& sequence);
recurrence::Sequence output(const at::Tensor& sequence);

/// A (B, T, D) output, uninitialised.
at::Tensor empty_sequence(at::IntArrayRef sizes, const at::TensorOptions& options);

/// The numbers of t, contiguous and nowhere lazy: t itself where it is so. Undefined where absent.
at::Tensor contiguous(const std::optional<at::Tensor>& t);
recurrence::ConstState state_input(const at::Tensor& state);

/// Runs a kernel on torch's threads with scratch from torch's allocator.
template <class Params>
void run_kernel(const Params& params);

extern template void run_kernel(const recurrence::LinearRecurrence&);
extern template void run_kernel(const recurrence::LinearRecurrenceBackward&);
extern template void run_kernel(const recurrence::PolarGateLoop&);
extern template void run_kernel(const recurrence::PolarGateLoopBackward&);
extern template void run_kernel(const recurrence::SimpleGateLoop&);
extern template void run_kernel(const recurrence::SimpleGateLoopBackward&);
extern template void run_kernel(const recurrence::GateLoop&);
extern template void run_kernel(const recurrence::GateLoopBackward&);
extern template void run_kernel(const recurrence::RmsNorm&);
extern template void run_kernel(const recurrence::RmsNormBackward&);

}  // namespace gateloop::ops
