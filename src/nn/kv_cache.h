#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace gateloop::nn {

/// Appends `fresh` (B, H, T, D) after the first `position` entries of `cache` (B, H, capacity, D);
/// an undefined cache is empty. Writes in place where `cache` is the only owner of its memory, and
/// else to a copy. The capacity doubles, so that T tokens of one owner cost O(T) copies in all.
/// Returns all entries, (B, H, position + T, D); gradients flow into the fresh ones only.
torch::Tensor append(torch::Tensor& cache, std::int64_t position, const torch::Tensor& fresh);

/// How many entries before `fresh` (B, H, T, D) a cache of a window holds: min(position, window -
/// 1). Throws c10::Error where it does not.
std::int64_t check_window(const torch::Tensor& cache, std::int64_t position,
                          const torch::Tensor& fresh, std::int64_t window);

/// The same for a window: `cache` holds the last min(position, window - 1) entries before, and then
/// the last of all. Returns those before and the fresh ones.
torch::Tensor append_to_window(torch::Tensor& cache, std::int64_t position,
                               const torch::Tensor& fresh, std::int64_t window);

}  // namespace gateloop::nn
