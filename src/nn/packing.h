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

/// How many steps the sequence of x (B, T, ...) has in earlier blocks, and in all blocks; without a
/// time group 0 and T.
struct Extent {
  std::int64_t before = 0;
  std::int64_t all = 0;

  static Extent of(const char* module, const torch::Tensor& x, const Packing& packing);
};

/// Of each step, (B, T) int64. Steps of padding are sequences of their own, numbered below zero.
struct Places {
  torch::Tensor sequence;  ///< which one
  torch::Tensor position;  ///< in it

  /// None in a batch of whole sequences. x: (B, T, ...), and of packed ones `begin` steps before
  /// it.
  static std::optional<Places> of(const Packing& packing, const torch::Tensor& x,
                                  std::int64_t begin = 0);

  /// (B, T, T) bool: of each step itself and the window - 1 before it in its sequence.
  torch::Tensor visible(std::int64_t window) const;
};

/// For ids (B, T), what follows in its sequence after each step but the last of T: (B, T - 1), and
/// -100, which torch's cross-entropy leaves out, after padding and where nothing follows.
/// `begin`: steps before ids, of packed sequences.
torch::Tensor next_tokens(const torch::Tensor& ids, const Packing& packing, std::int64_t begin = 0);

/// The same of a block of ids, over a time group.
struct TokensOver {
  torch::Tensor next;   ///< (B, T): after each step, in this block or a later one
  torch::Tensor count;  ///< (), of those to predict, in all blocks
};
TokensOver next_tokens_over_group(const torch::Tensor& ids, const Packing& packing);

/// (blocks, window, 2 window) bool: whether a step and one of its block, or of the block before it,
/// are of one sequence; `sequence` (past + T) is that of each step. Blocks begin after the past.
torch::Tensor pairs_of_blocks(const torch::Tensor& sequence, std::int64_t past, std::int64_t blocks,
                              std::int64_t window);

}  // namespace gateloop::nn
