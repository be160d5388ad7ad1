#include "ops/offsets.h"

#include <ATen/functorch/TensorWrapper.h>

#include <algorithm>
#include <functional>
#include <string>

namespace gateloop::ops {
namespace {

/// What torch.func's derivatives have wrapped: its numbers are those of the one inside.
at::Tensor unwrapped(at::Tensor t) {
  while (const auto* const wrapper = at::functorch::maybeGetTensorWrapper(t)) t = wrapper->value();
  return t;
}

}  // namespace

std::vector<std::int64_t> sequence_offsets(const char* op, const OptionalTensor& cu_seqlens,
                                           std::int64_t time) {
  if (!is_given(cu_seqlens)) return {};
  TORCH_CHECK(!cu_seqlens->is_meta() && !cu_seqlens->key_set().has(c10::DispatchKey::Python), op,
              ": the numbers of cu_seqlens are read, so that it cannot be traced "
              "(gate_loop can in its form scan)");
  const at::Tensor wide = unwrapped(cu_seqlens->resolve_neg().to(at::kCPU, at::kLong).contiguous());
  const auto* const first = wide.const_data_ptr<std::int64_t>();
  std::vector<std::int64_t> offsets(first, first + wide.numel());
  TORCH_CHECK_VALUE(offsets.front() == 0, op, ": cu_seqlens must begin with 0, got ",
                    offsets.front());
  TORCH_CHECK_VALUE(offsets.back() == time, op, ": cu_seqlens must end with T = ", time, ", got ",
                    offsets.back());
  const auto at = std::adjacent_find(offsets.begin(), offsets.end(), std::greater<>());
  TORCH_CHECK_VALUE(at == offsets.end(), op, ": cu_seqlens must not decrease, got ", at[1],
                    " after ", at[0]);
  return offsets;
}

at::Tensor kernel_offsets(const char* op, const OptionalTensor& cu_seqlens,
                          const at::Tensor& sequence) {
  if (!is_given(cu_seqlens)) return {};
  const std::int64_t time = sequence.size(1);
  at::Tensor offsets = unwrapped(cu_seqlens->resolve_neg().to(at::kLong).contiguous());
  if (offsets.is_cpu()) {
    sequence_offsets(op, offsets, time);
    return offsets.to(sequence.device());
  }
  const std::int64_t last = offsets.size(0) - 1;
  const at::Tensor ends = offsets.select(0, 0).eq(0).logical_and(offsets.select(0, last).eq(time));
  at::_assert_async(
      ends.logical_and(offsets.diff().ge(0).all()),
      std::string(op) + ": cu_seqlens must begin with 0, not decrease and end with T");
  return offsets;
}

recurrence::Offsets as_offsets(const at::Tensor& kernel_offsets) {
  if (!kernel_offsets.defined()) return {};
  return {kernel_offsets.const_data_ptr<std::int64_t>(),
          static_cast<std::size_t>(kernel_offsets.numel())};
}

}  // namespace gateloop::ops
