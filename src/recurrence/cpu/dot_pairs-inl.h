// Dot products of rows of bfloat16 by the instruction that multiplies pairs. The lanes of four
// rows' sums are added up together, one row after the other being read: rows side by side escape
// hardware prefetchers. A byte of quick takes 55 us, and 76 by products one by one (Zen 4, one
// thread).
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/product_words.h"
#include "recurrence/cpu/sums_of_lanes-inl.h"
#include "recurrence/cpu/words-inl.h"
#include "recurrence/inference.h"

#if defined(GATELOOP_RECURRENCE_CPU_DOT_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_DOT_PAIRS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_DOT_PAIRS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_DOT_PAIRS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

#if HWY_ARCH_X86 && HWY_TARGET == HWY_AVX3

/// The products of a row of bfloat16 with x, lane by lane.
template <bool kAhead>
HWY_INLINE hn::Vec<hn::ScalableTag<float>> LanesOfDot(const BFloat16* row, const BFloat16* x,
                                                      std::int64_t columns) {
  const hn::ScalableTag<float> d;
  const hn::ScalableTag<std::uint16_t> d16;
  constexpr auto kRun = static_cast<std::int64_t>(hn::MaxLanes(d16));
  const auto* const w = reinterpret_cast<const std::uint16_t*>(row);
  const auto* const in = reinterpret_cast<const std::uint16_t*>(x);
  auto sum = hn::Zero(d);
  std::int64_t c = 0;
  for (; c + kRun <= columns; c += kRun) {
    if constexpr (kAhead) hwy::Prefetch(w + c + kDotBytesAhead / 2);
    AddProduct<Word::kTwoBFloat16>(hn::BitCast(d, hn::LoadU(d16, w + c)),
                                   hn::BitCast(d, hn::LoadU(d16, in + c)), sum);
  }
  if (c < columns) {
    const auto rest = hn::FirstN(d16, static_cast<std::size_t>(columns - c));
    AddProduct<Word::kTwoBFloat16>(hn::BitCast(d, hn::MaskedLoad(rest, d16, w + c)),
                                   hn::BitCast(d, hn::MaskedLoad(rest, d16, in + c)), sum);
  }
  return sum;
}

/// y[r - first] = row r of the matrix · x, pairs of bfloat16.
template <bool kAhead>
void DotPairs(const Matrix& w, const BFloat16* x, std::int64_t first, std::int64_t last, float* y) {
  const auto at = [&](std::int64_t r) HWY_ATTR {
    const auto* const rows = static_cast<const BFloat16*>(w.data);
    return LanesOfDot<kAhead>(rows + std::min(r, last - 1) * w.columns, x, w.columns);
  };
  for (std::int64_t r = first; r < last; r += kDotTogether) {
    const auto a = at(r), b = at(r + 1), c = at(r + 2), e = at(r + 3);
    std::array<float, kDotTogether> sums;
    StoreSumsOfLanes(hn::ScalableTag<float>(), a, b, c, e, sums.data());
    std::copy_n(sums.data(), std::min(kDotTogether, last - r), y + r - first);
  }
}

#else

template <bool kAhead>
void DotPairs(const Matrix&, const BFloat16*, std::int64_t, std::int64_t, float*) {}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_DOT_PAIRS_INL_H_
