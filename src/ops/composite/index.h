#pragma once

/// Tensors of indices that the host computes.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gateloop::ops {

/// On the CPU, int64. at::tensor() would fill what torch.func's transforms have wrapped, and throw.
inline at::Tensor host_index(const std::vector<std::int64_t>& numbers) {
  const at::Tensor index(at::detail::empty_cpu({std::ssize(numbers)}, at::kLong));
  std::copy(numbers.begin(), numbers.end(), index.mutable_data_ptr<std::int64_t>());
  return index;
}

/// The same where `like` is. To another device than the CPU it is copied, which waits.
inline at::Tensor index_for(const at::Tensor& like, const std::vector<std::int64_t>& numbers) {
  return host_index(numbers).to(like.device());
}

}  // namespace gateloop::ops
