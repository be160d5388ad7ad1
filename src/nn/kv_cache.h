#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace gateloop::nn {

/// Appends `fresh` (B, H, T, D) after the first `position` entries of `cache` (B, H, capacity, D);
/// an undefined cache is empty. Writes in place where `cache` is the only owner of its memory, and
/// else to a copy. The capacity doubles, so that T tokens of one owner cost O(T) copies in all.
/// Returns all entries, (B, H, position + T, D); gradients flow into the fresh ones only.
torch::Tensor append(torch::Tensor& cache, std::int64_t position, const torch::Tensor& fresh);

}  // namespace gateloop::nn
