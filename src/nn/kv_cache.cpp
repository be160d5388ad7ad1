#include "nn/kv_cache.h"

#include <algorithm>

namespace gateloop::nn {

torch::Tensor append(torch::Tensor& cache, std::int64_t position, const torch::Tensor& fresh) {
  const auto time = fresh.size(2), length = position + time;
  const auto capacity = cache.defined() ? cache.size(2) : 0;
  if (cache.defined()) {
    TORCH_CHECK(cache.size(0) == fresh.size(0) && cache.size(1) == fresh.size(1) &&
                    cache.size(3) == fresh.size(3) && capacity >= position,
                "CausalFullAttention: state holds keys of shape ", cache.sizes(), " at position ",
                position, ", x makes keys of shape ", fresh.sizes());
  } else {
    TORCH_CHECK(position == 0, "CausalFullAttention: state is at position ", position,
                " but holds no keys");
  }
  {
    const torch::NoGradGuard no_grad;
    if (!cache.defined() || length > capacity) {
      auto grown =
          at::empty({fresh.size(0), fresh.size(1), std::max(length, 2 * capacity), fresh.size(3)},
                    fresh.options());
      if (position > 0) grown.narrow(2, 0, position).copy_(cache.narrow(2, 0, position));
      cache = grown;
    }
    cache.narrow(2, position, time).copy_(fresh);
  }
  if (position == 0) return fresh;
  if (fresh.requires_grad()) {
    // The cache is written in place later on, so the graph gets a copy of the past.
    return at::cat({cache.narrow(2, 0, position).to(fresh.scalar_type()), fresh}, 2);
  }
  return cache.narrow(2, 0, length).to(fresh.scalar_type());
}

}  // namespace gateloop::nn
