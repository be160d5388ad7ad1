#pragma once

/// What the kernels take from torch: threads or streams, memory, and tensors as plain structs.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "gateloop/recurrence.h"
#include "recurrence/training.h"

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

/// Runs a kernel on torch's threads, or on the current stream of a CUDA device, with scratch from
/// torch's allocator.
template <class Params>
void run_kernel(const Params& params, c10::Device device);

extern template void run_kernel(const recurrence::LinearRecurrence&, c10::Device);
extern template void run_kernel(const recurrence::LinearRecurrenceBackward&, c10::Device);
extern template void run_kernel(const recurrence::PolarGateLoop&, c10::Device);
extern template void run_kernel(const recurrence::PolarGateLoopBackward&, c10::Device);
extern template void run_kernel(const recurrence::SimpleGateLoop&, c10::Device);
extern template void run_kernel(const recurrence::SimpleGateLoopBackward&, c10::Device);
extern template void run_kernel(const recurrence::GateLoop&, c10::Device);
extern template void run_kernel(const recurrence::GateLoopBackward&, c10::Device);
extern template void run_kernel(const recurrence::RmsNorm&, c10::Device);
extern template void run_kernel(const recurrence::RmsNormBackward&, c10::Device);
extern template void run_kernel(const recurrence::ResidualNorm&, c10::Device);
extern template void run_kernel(const recurrence::ResidualNormBackward&, c10::Device);
extern template void run_kernel(const recurrence::Gelu&, c10::Device);
extern template void run_kernel(const recurrence::GeluBackward&, c10::Device);
extern template void run_kernel(const recurrence::SwishGate&, c10::Device);
extern template void run_kernel(const recurrence::SwishGateBackward&, c10::Device);

/// Calls register_all(torch::Library&) for each dispatch key whose devices have the kernel.
#ifdef GATELOOP_CUDA_KERNELS
#define GATELOOP_REGISTER_KERNELS(register_all)             \
  TORCH_LIBRARY_IMPL(gateloop, CPU, m) { register_all(m); } \
  TORCH_LIBRARY_IMPL(gateloop, CUDA, m) { register_all(m); }
#else
#define GATELOOP_REGISTER_KERNELS(register_all) \
  TORCH_LIBRARY_IMPL(gateloop, CPU, m) { register_all(m); }
#endif

}  // namespace gateloop::ops
