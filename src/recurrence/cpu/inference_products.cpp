// Products with weights in the format they are stored in: dot products for a few rows, and blocks
// of float32 for many.
#include <algorithm>
#include <cstring>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/inference.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/inference_products.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/dot-inl.h"
#include "recurrence/cpu/int8-inl.h"
#include "recurrence/cpu/rows-inl.h"

#ifndef GATELOOP_RECURRENCE_CPU_INFERENCE_PRODUCTS_ONCE_
#define GATELOOP_RECURRENCE_CPU_INFERENCE_PRODUCTS_ONCE_
namespace gateloop::recurrence::cpu {

/// Lanes of the widest target (AVX-512), in float32: two vectors make a panel of x.
inline constexpr std::int64_t kWidestPanel = 32;

/// Scratch of a blocked product, counted in float32.
struct ProductBuffers {
  std::int64_t x, per_slot;

  explicit ProductBuffers(const Product& p)
      : x((p.rows + kWidestPanel - 1) / kWidestPanel * kWidestPanel * p.matrix.columns),
        per_slot(kProductTileRows * kProductBlockRows + kMicroRows * kProductDepth) {}
};

inline bool is_few(const Product& p) { return p.rows <= kProductDotRows; }

/// Of one row arranged for dot products, whole cache lines.
inline std::size_t padded_row(const Product& p) {
  const std::size_t bytes = arranged_bytes(p.matrix.storage, p.matrix.columns);
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

}  // namespace gateloop::recurrence::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

void Arrange(Storage storage, const float* x, std::int64_t columns, void* arranged) {
  if (storage == Storage::kInt8) return RoundToInt16(x, columns, Int16Row(arranged));
  auto* const to = static_cast<float*>(arranged);
  if (to != x) std::copy_n(x, columns, to);
  if (storage == Storage::kBFloat16) ArrangeForDot<BFloat16>(to, columns);
}

template <class S>
void DotRows(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
             const float* bias, float* y) {
  const auto* const row = static_cast<const float*>(x);
  for (std::int64_t r = first; r < last; ++r) {
    const float sum = Dot(static_cast<const S*>(w.data) + r * w.columns, row, w.columns);
    y[r - first] = bias == nullptr ? sum : sum + bias[r];
  }
}

void DotRowsInt8(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
                 const float* bias, float* y) {
  const Int16Row row(const_cast<void*>(x));
  for (std::int64_t r = first; r < last; ++r) {
    const auto* const weights = static_cast<const std::int8_t*>(w.data) + r * w.columns;
    const float sum = DotInt8(weights, row.values, w.columns) * (w.scales[r] * *row.scale);
    y[r - first] = bias == nullptr ? sum : sum + bias[r];
  }
}

void MultiplyRows(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
                  const float* bias, float* y) {
  switch (w.storage) {
    case Storage::kFloat32:
      return DotRows<float>(w, x, first, last, bias, y);
    case Storage::kBFloat16:
      return DotRows<BFloat16>(w, x, first, last, bias, y);
    case Storage::kFloat16:
      return DotRows<Float16>(w, x, first, last, bias, y);
    case Storage::kInt8:
      return DotRowsInt8(w, x, first, last, bias, y);
  }
}

/// Columns [first, first + n) of one row as float32.
void WidenPart(const Matrix& w, std::int64_t row, std::int64_t first, std::int64_t n, float* to) {
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

void WidenRow(const Matrix& w, std::int64_t row, float* to) { WidenPart(w, row, 0, w.columns, to); }

inline constexpr auto kPanel =
    static_cast<std::int64_t>(2 * hn::MaxLanes(hn::ScalableTag<float>()));

/// to[r, 0 .. kPanel) += Σ_k w[r, k] panel[k], for kRows rows of weights `depth` numbers apart. Its
/// 12 sums hide the latency of two multiply-adds a cycle, and fit 16 registers.
template <int kRows>
HWY_INLINE void MicroTile(const float* HWY_RESTRICT w, const float* HWY_RESTRICT panel,
                          std::int64_t depth, float* HWY_RESTRICT to) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  hn::Vec<decltype(d)> low[kRows], high[kRows];
  for (int r = 0; r < kRows; ++r) {
    low[r] = hn::LoadU(d, to + r * kProductBlockRows);
    high[r] = hn::LoadU(d, to + r * kProductBlockRows + kLanes);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const auto x0 = hn::LoadU(d, panel + k * kPanel),
               x1 = hn::LoadU(d, panel + k * kPanel + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const auto weight = hn::Set(d, w[r * kProductDepth + k]);
      low[r] = hn::MulAdd(weight, x0, low[r]);
      high[r] = hn::MulAdd(weight, x1, high[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    hn::StoreU(low[r], d, to + r * kProductBlockRows);
    hn::StoreU(high[r], d, to + r * kProductBlockRows + kLanes);
  }
}

/// The panels of x: panel i holds rows i kPanel .. as (columns, kPanel), rows past the last zero.
void PackPanel(const Product& p, std::int64_t panel, float* packed) {
  const std::int64_t columns = p.matrix.columns, first = panel * kPanel;
  const std::int64_t rows = std::min(kPanel, p.rows - first);
  float* const to = packed + first * columns;
  if (rows < kPanel) std::fill_n(to, columns * kPanel, 0.0f);
  constexpr std::int64_t kStep = 16;  // a cache line of each row, so that both sides stay in L1
  for (std::int64_t begin = 0; begin < columns; begin += kStep) {
    const std::int64_t end = std::min(columns, begin + kStep);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* const from = p.x + (first + r) * p.x_stride;
      for (std::int64_t k = begin; k < end; ++k) to[k * kPanel + r] = from[k];
    }
  }
}

struct ProductTile {
  std::int64_t first_row, rows;        // of x
  std::int64_t first_column, columns;  // of y: rows of the matrix
};

template <int kRows>
std::int64_t MicroRows(const Product& p, const ProductTile& tile, std::int64_t column,
                       std::int64_t begin, std::int64_t depth, const float* packed, float* sums,
                       float* weights) {
  for (; column + kRows <= tile.columns; column += kRows) {
    for (int r = 0; r < kRows; ++r) {
      WidenPart(p.matrix, tile.first_column + column + r, begin, depth,
                weights + r * kProductDepth);
    }
    for (std::int64_t m = 0; m < tile.rows; m += kPanel) {
      const float* const panel = packed + (tile.first_row + m) * p.matrix.columns + begin * kPanel;
      MicroTile<kRows>(weights, panel, depth, sums + column * kProductBlockRows + m);
    }
  }
  return column;
}

/// One tile of y: sums, (columns, rows of x), are gathered block by block of the depth.
void RunTile(const Product& p, const ProductTile& tile, const float* packed, float* sums,
             float* weights) {
  std::fill_n(sums, kProductTileRows * kProductBlockRows, 0.0f);
  for (std::int64_t begin = 0; begin < p.matrix.columns; begin += kProductDepth) {
    const std::int64_t depth = std::min(kProductDepth, p.matrix.columns - begin);
    std::int64_t n = 0;
    n = MicroRows<kMicroRows>(p, tile, n, begin, depth, packed, sums, weights);
    n = MicroRows<3>(p, tile, n, begin, depth, packed, sums, weights);
    MicroRows<1>(p, tile, n, begin, depth, packed, sums, weights);
  }
  for (std::int64_t m = 0; m < tile.rows; ++m) {
    float* const y = p.y + (tile.first_row + m) * p.y_stride + tile.first_column;
    for (std::int64_t n = 0; n < tile.columns; ++n) y[n] = sums[n * kProductBlockRows + m];
    if (p.bias != nullptr) AddRow(p.bias + tile.first_column, y, tile.columns);
  }
}

void RunBlocked(const Product& p, const Executor& executor, float* scratch) {
  const ProductBuffers buffers(p);
  const int slots = std::max(1, executor.threads);
  parallel(executor, slots, (p.rows + kPanel - 1) / kPanel,
           [&](std::int64_t panel, std::int64_t) { PackPanel(p, panel, scratch); });
  const std::int64_t down = (p.rows + kProductBlockRows - 1) / kProductBlockRows;
  const std::int64_t across = (p.matrix.rows + kProductTileRows - 1) / kProductTileRows;
  parallel(executor, slots, down * across, [&](std::int64_t item, std::int64_t slot) {
    const std::int64_t row = item / across * kProductBlockRows,
                       column = item % across * kProductTileRows;
    float* const sums = scratch + buffers.x + slot * buffers.per_slot;
    RunTile(p,
            {row, std::min(kProductBlockRows, p.rows - row), column,
             std::min(kProductTileRows, p.matrix.rows - column)},
            scratch, sums, sums + kProductTileRows * kProductBlockRows);
  });
}

/// Multiplies a row of weights with every row of x while it is in L1.
void RunFew(const Product& p, const Executor& executor, void* scratch) {
  const std::size_t bytes = padded_row(p);
  const auto arranged = [&](std::int64_t m) {
    return static_cast<std::byte*>(scratch) + static_cast<std::size_t>(m) * bytes;
  };
  for (std::int64_t m = 0; m < p.rows; ++m) {
    Arrange(p.matrix.storage, p.x + m * p.x_stride, p.matrix.columns, arranged(m));
  }
  const std::int64_t tiles = (p.matrix.rows + kProductTileRows - 1) / kProductTileRows;
  parallel(executor, std::max(1, executor.threads), tiles, [&](std::int64_t tile, std::int64_t) {
    const std::int64_t last = std::min(p.matrix.rows, (tile + 1) * kProductTileRows);
    for (std::int64_t r = tile * kProductTileRows; r < last; ++r) {
      for (std::int64_t m = 0; m < p.rows; ++m) {
        MultiplyRows(p.matrix, arranged(m), r, r + 1, p.bias, p.y + m * p.y_stride + r);
      }
    }
  });
}

void RunProduct(const Product& p, const Executor& executor, void* scratch) {
  if (is_few(p)) return RunFew(p, executor, scratch);
  RunBlocked(p, executor, static_cast<float*>(scratch));
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(Arrange);
HWY_EXPORT(MultiplyRows);
HWY_EXPORT(WidenRow);
HWY_EXPORT(RunProduct);
}  // namespace cpu

using namespace cpu;

std::size_t arranged_bytes(Storage storage, std::int64_t columns) {
  const auto n = static_cast<std::size_t>(columns);
  return storage == Storage::kInt8 ? sizeof(float) + n * sizeof(std::int16_t) : n * sizeof(float);
}

void arrange(Storage storage, const float* x, std::int64_t columns, void* arranged) {
  HWY_DYNAMIC_DISPATCH(Arrange)(storage, x, columns, arranged);
}

void multiply_rows(const Matrix& matrix, const void* arranged, std::int64_t first,
                   std::int64_t last, const float* bias, float* y) {
  HWY_DYNAMIC_DISPATCH(MultiplyRows)(matrix, arranged, first, last, bias, y);
}

void widen_row(const Matrix& matrix, std::int64_t row, float* to) {
  HWY_DYNAMIC_DISPATCH(WidenRow)(matrix, row, to);
}

std::size_t scratch_bytes(const Product& p, int threads) {
  if (is_few(p)) return static_cast<std::size_t>(p.rows) * padded_row(p);
  const ProductBuffers buffers(p);
  return static_cast<std::size_t>(buffers.x + std::max(1, threads) * buffers.per_slot) *
         sizeof(float);
}

void run(const Product& p, const Executor& executor, void* scratch) {
  HWY_DYNAMIC_DISPATCH(RunProduct)(p, executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
