#pragma once

/// How a product of many rows packs its numbers, and what memory that takes.
#include <algorithm>
#include <cstdint>

#include "recurrence/cpu/constants.h"
#include "recurrence/inference.h"

namespace gateloop::recurrence::cpu {

/// What 32 bits hold: one number, or two that one instruction multiplies with two others, adding
/// both products to a sum of float32 or int32.
enum class Word : std::uint8_t { kFloat32, kTwoBFloat16, kTwoInt16 };

constexpr std::int64_t words_of(Word word, std::int64_t numbers) {
  return word == Word::kFloat32 ? numbers : (numbers + 1) / 2;
}

// A block of the depth begins with a whole word, and its sums of int8 times int16 fit int32.
static_assert(kProductDepth % 2 == 0 && kProductDepth * 128 * 32767 < std::int64_t{1} << 31);

/// Of dot products.
inline bool is_prefetched(const Matrix& w) {
  const auto bytes = static_cast<std::int64_t>(storage_bytes(w.storage));
  return w.rows * w.columns * bytes >= kDotBytesPrefetched;
}

/// Rows of x side by side in a panel, one vector or two, of the widest target (AVX-512).
inline constexpr std::int64_t kWidestPanel = 32;

/// Scratch of a blocked product, counted in float32.
struct ProductBuffers {
  std::int64_t rows, x, rounded, per_slot;

  explicit ProductBuffers(const Product& p)
      : rows((p.rows + kWidestPanel - 1) / kWidestPanel * kWidestPanel),
        x(rows * p.matrix.columns),
        rounded(p.matrix.storage == Storage::kBFloat16 || p.matrix.storage == Storage::kInt8
                    ? kWidestPanel * p.matrix.columns
                    : 0),
        per_slot(std::max(rounded,
                          kProductTileRows * kProductSumsStride + kMicroRows * kProductDepth)) {}

  /// Packed rows, a scale for each, and what a thread needs.
  std::int64_t total(int threads) const { return x + rows + std::max(1, threads) * per_slot; }
};

}  // namespace gateloop::recurrence::cpu
