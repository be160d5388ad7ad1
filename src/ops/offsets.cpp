#include "ops/offsets.h"

#include <algorithm>
#include <functional>

namespace gateloop::ops {

std::vector<std::int64_t> sequence_offsets(const char* op, const OptionalTensor& cu_seqlens,
                                           std::int64_t time) {
  if (!is_given(cu_seqlens)) return {};
  const at::Tensor wide = cu_seqlens->resolve_neg().contiguous().to(at::kLong);
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

}  // namespace gateloop::ops
