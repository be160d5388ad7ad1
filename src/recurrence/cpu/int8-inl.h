// Rows of int8 times a row rounded to int16.
#include <algorithm>
#include <cmath>

#include "recurrence/cpu/rows-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_INT8_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_INT8_INL_H_
#undef GATELOOP_RECURRENCE_CPU_INT8_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_INT8_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// A row as int16: x[c] = scale * values[c].
struct Int16Row {
  float* scale;
  std::int16_t* values;

  /// The scale first.
  static Int16Row in(void* memory) {
    auto* const scale = static_cast<float*>(memory);
    return {scale, reinterpret_cast<std::int16_t*>(scale + 1)};
  }
};

inline float LargestOf(const float* x, std::int64_t n) {
  const hn::ScalableTag<float> whole;
  auto most = hn::Zero(whole);
  float rest = 0;
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto v = hn::Abs(hn::LoadU(d, x + c));
    if constexpr (IsWhole(decltype(d)())) {
      most = hn::Max(most, v);
    } else {
      rest = std::max(rest, hn::GetLane(hn::MaxOfLanes(d, v)));
    }
  });
  return std::max(rest, hn::GetLane(hn::MaxOfLanes(whole, most)));
}

/// A row with a number that is not finite gets a scale of NaN: so do its products.
inline void RoundToInt16(const float* x, std::int64_t n, Int16Row to) {
  constexpr float kMost = 32767.0f;
  // A sum of finite squares may overflow; a sum of x - x is 0 or NaN.
  const float fault = SumOf<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto v = hn::LoadU(d, x + c);
    return hn::Sub(v, v);
  });
  const float most = LargestOf(x, n);
  if (fault != 0 || most < 1e-30f) {  // 32767 over less would overflow
    *to.scale = fault;
    std::fill_n(to.values, n, std::int16_t{0});
    return;
  }
  *to.scale = most / kMost;
  const float inverse = kMost / most;
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const hn::Rebind<std::int16_t, decltype(d)> d16;
    const auto rounded = hn::NearestInt(hn::Mul(hn::LoadU(d, x + c), hn::Set(d, inverse)));
    hn::StoreU(hn::DemoteTo(d16, rounded), d16, to.values + c);
  });
}

/// Σ row[c] x[c]. A product is at most 2^22, and a lane adds 256 of them in a block: below 2^30, so
/// that integers are exact. Blocks add up in float32.
template <bool kAhead>
float DotInt8(const std::int8_t* row, const std::int16_t* x, std::int64_t columns) {
  const hn::ScalableTag<std::int32_t> d32;
  constexpr auto kBlock = static_cast<std::int64_t>(256 * hn::MaxLanes(d32));
  const hn::ScalableTag<std::int16_t> d16;
  const hn::Rebind<std::int8_t, decltype(d16)> d8;
  constexpr auto kRun = static_cast<std::int64_t>(hn::MaxLanes(d16));
  float total = 0;
  for (std::int64_t begin = 0; begin < columns; begin += kBlock) {
    const std::int64_t end = std::min(columns, begin + kBlock);
    auto s0 = hn::Zero(d32), s1 = s0, t0 = s0, t1 = s0;
    std::int64_t c = begin;
    const auto add = [&](std::int64_t at, auto& low, auto& high) HWY_ATTR {
      const auto weights = hn::PromoteTo(d16, hn::LoadU(d8, row + at));
      low = hn::ReorderWidenMulAccumulate(d32, weights, hn::LoadU(d16, x + at), low, high);
    };
    for (; c + 2 * kRun <= end; c += 2 * kRun) {
      if constexpr (kAhead) hwy::Prefetch(row + c + kDotBytesAhead);
      add(c, s0, s1), add(c + kRun, t0, t1);
    }
    if (c + kRun <= end) add(c, s0, s1), c += kRun;
    const auto sum = hn::Add(hn::Add(s0, s1), hn::Add(t0, t1));
    // One lane is below 2^30, the sum of all may not be: it is taken in float32.
    const hn::RebindToFloat<decltype(d32)> df;
    float block = hn::GetLane(hn::SumOfLanes(df, hn::ConvertTo(df, sum)));
    for (; c < end; ++c) block += static_cast<float>(row[c] * x[c]);
    total += block;
  }
  return total;
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_INT8_INL_H_
