// Products of many rows with a stored matrix, in blocks that fit registers and caches.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dot-inl.h"
#include "recurrence/cpu/int8-inl.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/cpu/product_words.h"
#include "recurrence/cpu/rows-inl.h"
#include "recurrence/cpu/words-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_BLOCKED_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_BLOCKED_PRODUCTS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_BLOCKED_PRODUCTS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_BLOCKED_PRODUCTS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

inline constexpr auto kPanelLanes =
    static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
inline constexpr std::int64_t kPanel = 2 * kPanelLanes;
static_assert(kPanel <= kWidestPanel && kProductBlockRows % kPanel == 0);
/// Rows of weights in registers.
inline constexpr std::size_t kTogether = kPanelLanes >= 16 ? kMicroRows : kMicroRows / 2;

/// Rows of the panel in which `left` rows begin: one vector where they fit it, else two.
inline std::int64_t PanelWidth(std::int64_t left) {
  return left <= kPanelLanes ? kPanelLanes : kPanel;
}

/// Lane i of the four vectors to to[i stride .. + 3], for i < count.
template <class V>
HWY_INLINE void StoreTransposed(V a, V b, V c, V e, std::int64_t count, float* to,
                                std::int64_t stride) {
  const hn::ScalableTag<float> d;
  HWY_ALIGN float lanes[4 * kPanelLanes];
  hn::StoreInterleaved4(a, b, c, e, d, lanes);
  for (std::int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * stride, lanes + 4 * i, 4 * sizeof(float));
}

/// Words are in memory that may hold pairs.
inline float WordAt(const float* words) {
  float word;
  std::memcpy(&word, words, sizeof word);
  return word;
}

/// to[r, 0 .. kVectors lanes) += Σ_k w[r][k] panel[k], k over words. With two vectors its 12
/// or 24 sums hide the latency of two multiply-adds a cycle, and fit 16 or 32 registers.
template <Word kWord, std::size_t kRows, std::size_t kVectors>
HWY_INLINE void MicroTile(const std::array<const float*, kRows>& w, const float* HWY_RESTRICT panel,
                          std::int64_t words, float* HWY_RESTRICT to) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::size_t>(kPanelLanes);
  hn::Vec<decltype(d)> sums[kRows][kVectors], x[kVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = hn::Zero(d);
  for (std::int64_t k = 0; k < words; ++k) {
    for (std::size_t v = 0; v < kVectors; ++v) x[v] = hn::LoadU(d, panel + v * kLanes);
    panel += kVectors * kLanes;
    for (std::size_t r = 0; r < kRows; ++r) {
      const auto weight = hn::Set(d, WordAt(w[r] + k));
      for (std::size_t v = 0; v < kVectors; ++v) AddProduct<kWord>(weight, x[v], sums[r][v]);
    }
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      float* const at = to + r * kProductSumsStride + v * kLanes;
      auto sum = sums[r][v];
      if constexpr (kWord == Word::kTwoInt16)
        sum = hn::ConvertTo(d, hn::BitCast(hn::RebindToSigned<decltype(d)>(), sum));
      hn::StoreU(hn::Add(hn::LoadU(d, at), sum), d, at);
    }
  }
}

/// A row of x as words: where it lies, or rounded in `memory`. Of int16 its scale too.
template <Word kWord>
const float* RowWords(const Product& p, std::int64_t row, float* memory, float* scale) {
  const std::int64_t n = p.matrix.columns;
  const float* const x = p.x + row * p.x_stride;
  if constexpr (kWord == Word::kTwoBFloat16) {
    auto* const to = reinterpret_cast<BFloat16*>(memory);
    NarrowRow(x, n, to);
    if (n % 2 != 0) to[n] = BFloat16{};
  } else if constexpr (kWord == Word::kTwoInt16) {
    const Int16Row to{scale, reinterpret_cast<std::int16_t*>(memory)};
    RoundToInt16(x, n, to);
    if (n % 2 != 0) to.values[n] = 0;
  } else {
    if (p.matrix.storage != Storage::kBFloat16) return x;
    RoundToBFloat16(x, n, memory);
  }
  return memory;
}

/// The panels of x: panel i holds rows i kPanel .. as (words, PanelWidth()), rows past the last
/// zero.
template <Word kWord>
void PackPanel(const Product& p, std::int64_t panel, float* packed, float* scales, float* rounded) {
  const std::int64_t words = words_of(kWord, p.matrix.columns), first = panel * kPanel;
  const std::int64_t rows = std::min(kPanel, p.rows - first), width = PanelWidth(rows);
  std::array<const float*, static_cast<std::size_t>(kPanel)> from{};
  for (std::int64_t r = 0; r < rows; ++r) {
    from[static_cast<std::size_t>(r)] =
        RowWords<kWord>(p, first + r, rounded + r * words, scales + first + r);
  }
  float* const to = packed + first * words;
  if (rows < width) std::fill_n(to, words * width, 0.0f);
  const hn::ScalableTag<float> d;
  const std::int64_t whole_words = words / kPanelLanes * kPanelLanes, whole_rows = rows / 4 * 4;
  for (std::int64_t k = 0; k < whole_words; k += kPanelLanes) {
    for (std::int64_t r = 0; r < whole_rows; r += 4) {
      const float* const* const row = from.data() + r;
      StoreTransposed(hn::LoadU(d, row[0] + k), hn::LoadU(d, row[1] + k), hn::LoadU(d, row[2] + k),
                      hn::LoadU(d, row[3] + k), kPanelLanes, to + k * width + r, width);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* const row = from[static_cast<std::size_t>(r)];
    for (std::int64_t k = r < whole_rows ? whole_words : 0; k < words; ++k)
      to[k * width + r] = WordAt(row + k);
  }
}

/// Columns [first, first + n) of one row as float32.
inline void WidenPart(const Matrix& w, std::int64_t row, std::int64_t first, std::int64_t n,
                      float* to) {
  const std::int64_t at = row * w.columns + first;
  switch (w.storage) {
    case Storage::kFloat32:
      return Widen(static_cast<const float*>(w.data) + at, n, to);
    case Storage::kBFloat16:
      return Widen(static_cast<const BFloat16*>(w.data) + at, n, to);
    case Storage::kFloat16:
      return Widen(static_cast<const Float16*>(w.data) + at, n, to);
    case Storage::kInt8: {
      const auto* const from = static_cast<const std::int8_t*>(w.data) + at;
      const float scale = w.scales[row];
      ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
        const hn::Rebind<std::int8_t, decltype(d)> d8;
        const hn::Rebind<std::int32_t, decltype(d)> d32;
        const auto wide = hn::ConvertTo(d, hn::PromoteTo(d32, hn::LoadU(d8, from + c)));
        hn::StoreU(hn::Mul(wide, hn::Set(d, scale)), d, to + c);
      });
    }
  }
}

/// The same as words: where they lie, or in `to`.
template <Word kWord>
const float* WeightWords(const Matrix& w, std::int64_t row, std::int64_t first, std::int64_t n,
                         float* to) {
  const std::int64_t at = row * w.columns + first;
  if constexpr (kWord == Word::kTwoBFloat16) {
    const auto* const from = static_cast<const BFloat16*>(w.data) + at;
    const bool aligned = reinterpret_cast<std::uintptr_t>(from) % alignof(float) == 0;
    if (n % 2 == 0 && aligned) return reinterpret_cast<const float*>(from);
    auto* const words = reinterpret_cast<BFloat16*>(to);
    std::copy_n(from, n, words);
    if (n % 2 != 0) words[n] = BFloat16{};
  } else if constexpr (kWord == Word::kTwoInt16) {
    auto* const words = reinterpret_cast<std::int16_t*>(to);
    std::copy_n(static_cast<const std::int8_t*>(w.data) + at, n, words);
    if (n % 2 != 0) words[n] = 0;
  } else {
    if (w.storage == Storage::kFloat32) return static_cast<const float*>(w.data) + at;
    WidenPart(w, row, first, n, to);
  }
  return to;
}

struct ProductTile {
  std::int64_t first_row, rows;        // of x
  std::int64_t first_column, columns;  // of y: rows of the matrix
};

template <Word kWord, std::size_t kRows>
std::int64_t MicroRows(const Product& p, const ProductTile& tile, std::int64_t column,
                       std::int64_t begin, std::int64_t depth, const float* packed, float* sums,
                       float* memory) {
  const std::int64_t words = words_of(kWord, p.matrix.columns);
  for (; column + static_cast<std::int64_t>(kRows) <= tile.columns;
       column += static_cast<std::int64_t>(kRows)) {
    std::array<const float*, kRows> weights;
    for (std::size_t r = 0; r < kRows; ++r) {
      weights[r] =
          WeightWords<kWord>(p.matrix, tile.first_column + column + static_cast<std::int64_t>(r),
                             begin, depth, memory + static_cast<std::int64_t>(r) * kProductDepth);
    }
    for (std::int64_t m = 0; m < tile.rows; m += kPanel) {
      const std::int64_t width = PanelWidth(tile.rows - m);
      const float* const panel =
          packed + (tile.first_row + m) * words + words_of(kWord, begin) * width;
      float* const to = sums + column * kProductSumsStride + m;
      if (width == kPanel) {
        MicroTile<kWord, kRows, 2>(weights, panel, words_of(kWord, depth), to);
      } else {
        MicroTile<kWord, kRows, 1>(weights, panel, words_of(kWord, depth), to);
      }
    }
  }
  return column;
}

/// One tile of y: sums, (columns, rows of x), are gathered block by block of the depth.
template <Word kWord>
void RunTile(const Product& p, const ProductTile& tile, const float* packed, const float* scales,
             float* sums, float* memory) {
  std::fill_n(sums, kProductTileRows * kProductSumsStride, 0.0f);
  for (std::int64_t begin = 0; begin < p.matrix.columns; begin += kProductDepth) {
    const std::int64_t depth = std::min(kProductDepth, p.matrix.columns - begin);
    std::int64_t n = 0;
    n = MicroRows<kWord, kTogether>(p, tile, n, begin, depth, packed, sums, memory);
    n = MicroRows<kWord, 3>(p, tile, n, begin, depth, packed, sums, memory);
    MicroRows<kWord, 1>(p, tile, n, begin, depth, packed, sums, memory);
  }
  constexpr float kNoBias[kProductTileRows] = {};
  const float* const bias = p.bias == nullptr ? kNoBias : p.bias + tile.first_column;
  for (std::int64_t m = 0; m < tile.rows; ++m) {
    float* const y = p.y + (tile.first_row + m) * p.y_stride + tile.first_column;
    for (std::int64_t n = 0; n < tile.columns; ++n) {
      float sum = sums[n * kProductSumsStride + m];
      if constexpr (kWord == Word::kTwoInt16)
        sum *= scales[tile.first_row + m] * p.matrix.scales[tile.first_column + n];
      y[n] = sum + bias[n];
    }
  }
}

template <Word kWord>
void RunBlocked(const Product& p, const Executor& executor, float* scratch) {
  const ProductBuffers buffers(p);
  float* const packed = scratch;
  float* const scales = packed + buffers.x;
  float* const slots = scales + buffers.rows;
  const int threads = std::max(1, executor.threads);
  parallel(executor, threads, (p.rows + kPanel - 1) / kPanel,
           [&](std::int64_t panel, std::int64_t slot) {
             PackPanel<kWord>(p, panel, packed, scales, slots + slot * buffers.per_slot);
           });
  const std::int64_t down = (p.rows + kProductBlockRows - 1) / kProductBlockRows;
  const std::int64_t across = (p.matrix.rows + kProductTileRows - 1) / kProductTileRows;
  parallel(executor, threads, down * across, [&](std::int64_t item, std::int64_t slot) {
    const std::int64_t row = item / across * kProductBlockRows,
                       column = item % across * kProductTileRows;
    float* const sums = slots + slot * buffers.per_slot;
    RunTile<kWord>(p,
                   {row, std::min(kProductBlockRows, p.rows - row), column,
                    std::min(kProductTileRows, p.matrix.rows - column)},
                   packed, scales, sums, sums + kProductTileRows * kProductSumsStride);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_BLOCKED_PRODUCTS_INL_H_
