// Products of small matrices that stay in a core's caches.
#include <algorithm>
#include <cstdint>

#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_TILE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_TILE_PRODUCTS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_TILE_PRODUCTS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_TILE_PRODUCTS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// The left factor of a product, a(row, step) = data[row * row_stride + step * step_stride]: its
/// numbers are read one by one, so that a transposed one costs the same.
template <class T>
struct Factor {
  const T* data;
  std::int64_t row_stride, step_stride;

  Factor From(std::int64_t row, std::int64_t step) const {
    return {data + row * row_stride + step * step_stride, row_stride, step_stride};
  }
};

/// A matrix with contiguous rows.
template <class T>
struct Tile {
  T* data;
  std::int64_t stride;

  T* operator[](std::int64_t row) const { return data + row * stride; }
  Tile From(std::int64_t row, std::int64_t column) const {
    return {data + row * stride + column, stride};
  }
  Factor<T> AsFactor() const { return {data, stride, 1}; }
  Factor<T> Transposed() const { return {data, 1, stride}; }
};

/// Up to 6 rows times 2 vectors: 12 sums hide the latency of two multiply-adds a cycle, and fit 16
/// registers beside what they read.
inline constexpr int kRegisterRows = 6;

template <int kRows, int kVectors, bool kAdd, class T>
HWY_INLINE void RegisterTile(std::int64_t depth, Factor<T> a, Tile<T> b, Tile<T> c) {
  const hn::ScalableTag<T> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  hn::Vec<decltype(d)> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      sums[r][i] = kAdd ? hn::LoadU(d, c[r] + i * kLanes) : hn::Zero(d);
    }
  }
  for (std::int64_t step = 0; step < depth; ++step) {
    const T* const left = a.data + step * a.step_stride;
    hn::Vec<decltype(d)> right[kVectors];
    for (int i = 0; i < kVectors; ++i) right[i] = hn::LoadU(d, b[step] + i * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const auto factor = hn::Set(d, left[r * a.row_stride]);
      for (int i = 0; i < kVectors; ++i) sums[r][i] = hn::MulAdd(factor, right[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) hn::StoreU(sums[r][i], d, c[r] + i * kLanes);
  }
}

/// The last rows, fewer than kRegisterRows.
template <int kRows, int kVectors, bool kAdd, class T>
HWY_INLINE void LastRows(std::int64_t rows, std::int64_t depth, Factor<T> a, Tile<T> b, Tile<T> c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return RegisterTile<kRows, kVectors, kAdd>(depth, a, b, c);
    LastRows<kRows - 1, kVectors, kAdd>(rows, depth, a, b, c);
  }
}

template <int kVectors, bool kAdd, class T>
void ColumnProduct(std::int64_t rows, std::int64_t depth, Factor<T> a, Tile<T> b, Tile<T> c) {
  std::int64_t r = 0;
  for (; r + kRegisterRows <= rows; r += kRegisterRows) {
    RegisterTile<kRegisterRows, kVectors, kAdd>(depth, a.From(r, 0), b, c.From(r, 0));
  }
  LastRows<kRegisterRows - 1, kVectors, kAdd>(rows - r, depth, a.From(r, 0), b, c.From(r, 0));
}

/// c = a b, or c += a b: (rows, depth) times (depth, columns). b and c are read and written in
/// whole vectors: up to the next multiple of kTileColumns.
template <bool kAdd, class T>
void Product(std::int64_t rows, std::int64_t columns, std::int64_t depth, Factor<T> a, Tile<T> b,
             Tile<T> c) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  std::int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
    ColumnProduct<2, kAdd>(rows, depth, a, b.From(0, n), c.From(0, n));
  }
  for (; n < columns; n += kLanes) {
    ColumnProduct<1, kAdd>(rows, depth, a, b.From(0, n), c.From(0, n));
  }
}

/// c = a b with a lower triangular: a(r, s) = 0 for s > r, which is not read beyond a group.
template <bool kAdd, class T>
void LowerProduct(std::int64_t n, std::int64_t columns, Factor<T> a, Tile<T> b, Tile<T> c) {
  for (std::int64_t r = 0; r < n; r += kTileColumns) {
    const std::int64_t rows = std::min(kTileColumns, n - r);
    Product<kAdd>(rows, columns, r + rows, a.From(r, 0), b, c.From(r, 0));
  }
}

/// The same with a upper triangular: a(r, s) = 0 for s < r.
template <bool kAdd, class T>
void UpperProduct(std::int64_t n, std::int64_t columns, Factor<T> a, Tile<T> b, Tile<T> c) {
  for (std::int64_t r = 0; r < n; r += kTileColumns) {
    Product<kAdd>(std::min(kTileColumns, n - r), columns, n - r, a.From(r, r), b.From(r, 0),
                  c.From(r, 0));
  }
}

/// c = a b where only the upper triangle of c, (n, n), is wanted, diagonal included. Whole groups
/// of columns are written.
template <class T>
void ProductAbove(std::int64_t n, std::int64_t depth, Factor<T> a, Tile<T> b, Tile<T> c) {
  for (std::int64_t r = 0; r < n; r += kTileColumns) {
    Product<false>(std::min(kTileColumns, n - r), whole_tiles(n) - r, depth, a.From(r, 0),
                   b.From(0, r), c.From(r, r));
  }
}

/// to = from transposed, (rows, columns) -> (columns, rows), zeros up to whole groups of columns.
template <class T>
void Transpose(std::int64_t rows, std::int64_t columns, Tile<T> from, Tile<T> to) {
  for (std::int64_t r = 0; r < rows; r += kTileColumns) {
    const std::int64_t end = std::min(rows, r + kTileColumns);
    for (std::int64_t c = 0; c < columns; ++c) {
      for (std::int64_t i = r; i < end; ++i) to[c][i] = from[i][c];
      std::fill(to[c] + end, to[c] + r + kTileColumns, T(0));
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_TILE_PRODUCTS_INL_H_
