#include "ops/cpu/executor.h"

#include <ATen/Parallel.h>

#include <functional>

#include "host/output_memory.h"
#include "ops/cpu/pooled_memory.h"

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
  host::ready_output(sequence.mutable_data_ptr(), sequence.nbytes(), sizes[0], torch_threads());
  return sequence;
}

at::Tensor contiguous(const std::optional<at::Tensor>& t) {
  if (!t.has_value() || !t->defined()) return {};
  return t->resolve_conj().resolve_neg().contiguous();
}

recurrence::ConstState state_input(const at::Tensor& state) {
  return state.defined() ? state.const_data_ptr() : nullptr;
}

template <class Params>
void run_kernel(const Params& params) {
  const recurrence::Executor executor = torch_threads();
  const auto bytes = static_cast<std::int64_t>(recurrence::scratch_bytes(params, executor.threads));
  // c10's CPU allocator aligns to 64 bytes, which is what the kernels ask for.
  const at::Tensor scratch = bytes > 0 ? at::empty({bytes}, at::kByte) : at::Tensor();
  recurrence::run(params, executor, bytes > 0 ? scratch.mutable_data_ptr() : nullptr);
}

template void run_kernel(const recurrence::LinearRecurrence&);
template void run_kernel(const recurrence::LinearRecurrenceBackward&);
template void run_kernel(const recurrence::PolarGateLoop&);
template void run_kernel(const recurrence::PolarGateLoopBackward&);
template void run_kernel(const recurrence::SimpleGateLoop&);
template void run_kernel(const recurrence::SimpleGateLoopBackward&);
template void run_kernel(const recurrence::GateLoop&);
template void run_kernel(const recurrence::GateLoopBackward&);
template void run_kernel(const recurrence::RmsNorm&);
template void run_kernel(const recurrence::RmsNormBackward&);

}  // namespace gateloop::ops
