// Products with weights in the format they are stored in: dot products for a few rows, and blocks
// for many.
#include <algorithm>
#include <cstring>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/cpu/product_words.h"
#include "recurrence/inference.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/inference_products.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/blocked_products-inl.h"
#include "recurrence/cpu/dot-inl.h"
#include "recurrence/cpu/dot_pairs-inl.h"
#include "recurrence/cpu/int8-inl.h"
#include "recurrence/cpu/rows-inl.h"

#ifndef GATELOOP_RECURRENCE_CPU_INFERENCE_PRODUCTS_ONCE_
#define GATELOOP_RECURRENCE_CPU_INFERENCE_PRODUCTS_ONCE_
namespace gateloop::recurrence::cpu {

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
  if (storage == Storage::kInt8) return RoundToInt16(x, columns, Int16Row::in(arranged));
  if (WordOf(storage) == Word::kTwoBFloat16)
    return NarrowRow(x, columns, static_cast<BFloat16*>(arranged));
  auto* const to = static_cast<float*>(arranged);
  if (storage == Storage::kBFloat16) {
    RoundToBFloat16(x, columns, to);
    return ArrangeForDot<BFloat16>(to, columns);
  }
  if (to != x) std::copy_n(x, columns, to);
}

template <bool kAhead, class S>
void DotRows(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
             const float* bias, float* y) {
  const auto* const row = static_cast<const float*>(x);
  for (std::int64_t r = first; r < last; ++r) {
    const float sum = Dot<kAhead>(static_cast<const S*>(w.data) + r * w.columns, row, w.columns);
    y[r - first] = bias == nullptr ? sum : sum + bias[r];
  }
}

template <bool kAhead>
void DotRowsInt8(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
                 const float* bias, float* y) {
  const auto row = Int16Row::in(const_cast<void*>(x));
  for (std::int64_t r = first; r < last; ++r) {
    const auto* const weights = static_cast<const std::int8_t*>(w.data) + r * w.columns;
    const float sum = DotInt8<kAhead>(weights, row.values, w.columns) * (w.scales[r] * *row.scale);
    y[r - first] = bias == nullptr ? sum : sum + bias[r];
  }
}

template <bool kAhead>
void MultiplyRowsAhead(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
                       const float* bias, float* y) {
  if (WordOf(w.storage) == Word::kTwoBFloat16) {
    DotPairs<kAhead>(w, static_cast<const BFloat16*>(x), first, last, y);
    if (bias != nullptr) AddRow(bias + first, y, last - first);
    return;
  }
  switch (w.storage) {
    case Storage::kFloat32:
      return DotRows<kAhead, float>(w, x, first, last, bias, y);
    case Storage::kBFloat16:
      return DotRows<kAhead, BFloat16>(w, x, first, last, bias, y);
    case Storage::kFloat16:
      return DotRows<kAhead, Float16>(w, x, first, last, bias, y);
    case Storage::kInt8:
      return DotRowsInt8<kAhead>(w, x, first, last, bias, y);
  }
}

void MultiplyRows(const Matrix& w, const void* x, std::int64_t first, std::int64_t last,
                  const float* bias, float* y) {
  if (is_prefetched(w)) return MultiplyRowsAhead<true>(w, x, first, last, bias, y);
  MultiplyRowsAhead<false>(w, x, first, last, bias, y);
}

void WidenRow(const Matrix& w, std::int64_t row, float* to) { WidenPart(w, row, 0, w.columns, to); }

/// Multiplies a few rows of weights with every row of x while they are in the nearest caches.
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
    for (std::int64_t r = tile * kProductTileRows; r < last; r += kDotTogether) {
      const std::int64_t end = std::min(last, r + kDotTogether);
      for (std::int64_t m = 0; m < p.rows; ++m)
        MultiplyRows(p.matrix, arranged(m), r, end, p.bias, p.y + m * p.y_stride + r);
    }
  });
}

void RunProduct(const Product& p, const Executor& executor, void* scratch) {
  if (is_few(p)) return RunFew(p, executor, scratch);
  auto* const memory = static_cast<float*>(scratch);
  switch (WordOf(p.matrix.storage)) {
    case Word::kFloat32:
      return RunBlocked<Word::kFloat32>(p, executor, memory);
    case Word::kTwoBFloat16:
      return RunBlocked<Word::kTwoBFloat16>(p, executor, memory);
    case Word::kTwoInt16:
      return RunBlocked<Word::kTwoInt16>(p, executor, memory);
  }
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
  return static_cast<std::size_t>(ProductBuffers(p).total(threads)) * sizeof(float);
}

void run(const Product& p, const Executor& executor, void* scratch) {
  HWY_DYNAMIC_DISPATCH(RunProduct)(p, executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
