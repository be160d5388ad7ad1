#include "ops/kernels/executor.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <functional>

#include "gateloop/recurrence_cuda.h"
#include "host/output_memory.h"
#include "ops/kernels/pooled_memory.h"

#ifndef INTRA_OP_PARALLEL
#error "at::parallel_for would run on one thread: compile this file for OpenMP"
#endif

namespace gateloop::ops {

recurrence::Executor torch_threads() {
  recurrence::Executor executor;
  executor.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  executor.parallel_for = [](std::int64_t n, const std::function<void(std::int64_t)>& body) {
    at::parallel_for(0, n, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) body(i);
    });
  };
  return executor;
}

recurrence::DType kernel_dtype(at::ScalarType dtype) {
  using recurrence::DType;
  switch (dtype) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kComplexFloat:
      return DType::kComplex64;
    case at::kComplexDouble:
      return DType::kComplex128;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "gateloop: no kernel for dtype ", dtype);
  }
}

recurrence::Shape kernel_shape(const at::Tensor& sequence) {
  return {sequence.size(0), sequence.size(1), sequence.size(2)};
}

at::Tensor with_contiguous_channels(const std::optional<at::Tensor>& sequence) {
  if (!sequence.has_value() || !sequence->defined()) return {};
  const at::Tensor resolved = sequence->resolve_conj().resolve_neg();
  const bool contiguous = resolved.stride(-1) == 1 || resolved.size(-1) == 1;
  return contiguous ? resolved : resolved.contiguous();
}

recurrence::ConstSequence input(const at::Tensor& sequence) {
  if (!sequence.defined()) return {};
  return {sequence.const_data_ptr(), sequence.stride(0), sequence.stride(1)};
}

recurrence::Sequence output(const at::Tensor& sequence) {
  return {sequence.mutable_data_ptr(), sequence.stride(0), sequence.stride(1)};
}

at::Tensor empty_sequence(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor sequence = empty_pooled(sizes, options);
  if (sequence.is_cpu()) {
    host::ready_output(sequence.mutable_data_ptr(), sequence.nbytes(), sizes[0], torch_threads());
  }
  return sequence;
}

at::Tensor contiguous(const std::optional<at::Tensor>& t) {
  if (!t.has_value() || !t->defined()) return {};
  return t->resolve_conj().resolve_neg().contiguous();
}

recurrence::ConstState state_input(const at::Tensor& state) {
  return state.defined() ? state.const_data_ptr() : nullptr;
}

namespace {

/// Uninitialised memory of one kernel. Torch aligns it to 64 bytes on the CPU and to 512 on CUDA,
/// no less than the kernels need.
class Scratch {
 public:
  Scratch(std::size_t bytes, c10::Device device) {
    if (bytes == 0) return;
    memory_ =
        at::empty({static_cast<std::int64_t>(bytes)}, at::TensorOptions(device).dtype(at::kByte));
  }
  void* data() const { return memory_.defined() ? memory_.mutable_data_ptr() : nullptr; }

 private:
  at::Tensor memory_;
};

template <class Params>
void run_on_cpu(const Params& params) {
  const recurrence::Executor executor = torch_threads();
  const Scratch scratch(recurrence::scratch_bytes(params, executor.threads), at::kCPU);
  recurrence::run(params, executor, scratch.data());
}

#ifdef GATELOOP_CUDA_KERNELS
/// Device-neutral c10 reaches the stream: a build against torch for the CPU serves torch with CUDA.
template <class Params>
void run_on_cuda(const Params& params, c10::Device device) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  const Scratch scratch(recurrence::cuda::scratch_bytes(params), device);
  recurrence::cuda::run(params, {.stream = static_cast<CUstream_st*>(stream.native_handle()),
                                 .device = device.index(),
                                 .scratch = scratch.data()});
}
template <class Params>
concept HasCudaKernel = requires(const Params& p) {
  recurrence::cuda::scratch_bytes(p);
};
#endif

}  // namespace

template <class Params>
void run_kernel(const Params& params, c10::Device device) {
#ifdef GATELOOP_CUDA_KERNELS
  if constexpr (HasCudaKernel<Params>) {
    if (device.is_cuda()) return run_on_cuda(params, device);
  }
#endif
  TORCH_INTERNAL_ASSERT(device.is_cpu());
  run_on_cpu(params);
}

template void run_kernel(const recurrence::LinearRecurrence&, c10::Device);
template void run_kernel(const recurrence::LinearRecurrenceBackward&, c10::Device);
template void run_kernel(const recurrence::PolarGateLoop&, c10::Device);
template void run_kernel(const recurrence::PolarGateLoopBackward&, c10::Device);
template void run_kernel(const recurrence::SimpleGateLoop&, c10::Device);
template void run_kernel(const recurrence::SimpleGateLoopBackward&, c10::Device);
template void run_kernel(const recurrence::GateLoop&, c10::Device);
template void run_kernel(const recurrence::GateLoopBackward&, c10::Device);
template void run_kernel(const recurrence::RmsNorm&, c10::Device);
template void run_kernel(const recurrence::RmsNormBackward&, c10::Device);
template void run_kernel(const recurrence::ResidualNorm&, c10::Device);
template void run_kernel(const recurrence::ResidualNormBackward&, c10::Device);
template void run_kernel(const recurrence::Gelu&, c10::Device);
template void run_kernel(const recurrence::GeluBackward&, c10::Device);
template void run_kernel(const recurrence::SwishGate&, c10::Device);
template void run_kernel(const recurrence::SwishGateBackward&, c10::Device);

}  // namespace gateloop::ops
