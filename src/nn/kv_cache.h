#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace gateloop::nn {

/// Appends `fresh` (B, H, T, D) after the first `position` entries of `cache` (B, H, capacity, D),
/// which grows by doubling, so that T tokens cost O(T) copies in all. An undefined cache is empty.
/// Returns all entries, (B, H, position + T, D); gradients flow into the fresh ones only.
torch::Tensor append(torch::Tensor& cache, std::int64_t position, const torch::Tensor& fresh);

}  // namespace gateloop::nn
