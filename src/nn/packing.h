#pragma once

/// Where each step stands, in a batch of packed or padded sequences.
#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "gateloop/nn/mixer.h"

namespace gateloop::nn {

/// Throws c10::Error where what is given does not fit x (B, T, ...), which the module calls `name`.
void check_packing(const char* module, const char* name, const torch::Tensor& x,
                   const Packing& packing);

/// Of each step, (B, T) int64. Steps of padding are sequences of their own, numbered below zero.
struct Places {
  torch::Tensor sequence;  ///< which one
  torch::Tensor position;  ///< in it

  /// None in a batch of whole sequences. x: (B, T, ...).
  static std::optional<Places> of(const Packing& packing, const torch::Tensor& x);

  /// (B, T, T) bool: of each step itself and the window - 1 before it in its sequence.
  torch::Tensor visible(std::int64_t window) const;
};

/// For ids (B, T), what follows in its sequence after each step but the last of T: (B, T - 1), and
/// -100, which torch's cross-entropy leaves out, after padding and where nothing follows.
torch::Tensor next_tokens(const torch::Tensor& ids, const Packing& packing);

/// (blocks, window, 2 window) bool: whether a step and one of its block, or of the block before it,
/// are of one sequence; `sequence` (T) is that of each step.
torch::Tensor pairs_of_blocks(const torch::Tensor& sequence, std::int64_t blocks,
                              std::int64_t window);

}  // namespace gateloop::nn
