// A row of a matrix times a vector.
#include <type_traits>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_DOT_INL_H_
#undef GATELOOP_RECURRENCE_CPU_DOT_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_DOT_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// How many numbers one load of a row gives: a vector of float32 holds two bfloat16 a lane.
template <class S>
constexpr std::int64_t kDotRun =
    static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<Accumulation<S>>()) *
                              (std::is_same_v<S, BFloat16> && HWY_TARGET != HWY_SCALAR ? 2 : 1));

/// To the nearest bfloat16, as float32. `to` may be x.
inline void RoundToBFloat16(const float* x, std::int64_t n, float* to) {
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const hn::RebindToUnsigned<decltype(d)> du;
    const auto bits = hn::And(BFloat16Bits(d, hn::LoadU(d, x + c)), hn::Set(du, 0xFFFF0000u));
    hn::StoreU(hn::BitCast(d, bits), d, to + c);
  });
}

/// Puts x into the order in which Dot<S> reads it, in place: of bfloat16, in every whole run, the
/// even numbers before the odd ones.
template <class S>
void ArrangeForDot(Accumulation<S>* x, std::int64_t n) {
  using D = hn::ScalableTag<Accumulation<S>>;
  constexpr std::int64_t kRun = kDotRun<S>;
  if constexpr (kRun > static_cast<std::int64_t>(hn::MaxLanes(D()))) {
    const D d;
    for (std::int64_t c = 0; c + kRun <= n; c += kRun) {
      const auto pairs = Load<Complex<D>>(d, x, c / 2);
      hn::StoreU(pairs.re, d, x + c);
      hn::StoreU(pairs.im, d, x + c + kRun / 2);
    }
  }
}

/// sum0 and sum1 += the products of a run.
template <class S, class D, class V>
HWY_INLINE void AddRun(D d, const S* row, const Accumulation<S>* x, V& sum0, V& sum1) {
  if constexpr (kDotRun < S >> static_cast<std::int64_t>(hn::MaxLanes(D()))) {
    // A shift and a mask widen two vectors; to widen each by itself takes twice the operations, and
    // more time than reading the weights from memory.
    const hn::RebindToUnsigned<D> du;
    const auto pairs = hn::LoadU(du, reinterpret_cast<const std::uint32_t*>(row));
    const auto even = hn::BitCast(d, hn::ShiftLeft<16>(pairs));
    const auto odd = hn::BitCast(d, hn::And(pairs, hn::Set(du, 0xFFFF0000u)));
    sum0 = hn::MulAdd(even, hn::LoadU(d, x), sum0);
    sum1 = hn::MulAdd(odd, hn::LoadU(d, x + hn::MaxLanes(D())), sum1);
  } else {
    sum0 = hn::MulAdd(LoadReal(d, row), hn::LoadU(d, x), sum0);
  }
}

/// row · x, x as ArrangeForDot<S> leaves it. One row after the other: the whole matrix is then one
/// stream through memory, which hardware prefetchers follow. Four sums hide the latency of the
/// fused multiply-add.
template <bool kAhead, class S>
Accumulation<S> Dot(const S* row, const Accumulation<S>* x, std::int64_t columns) {
  using T = Accumulation<S>;
  const hn::ScalableTag<T> d;
  constexpr std::int64_t kRun = kDotRun<S>;
  constexpr auto kLine = static_cast<std::int64_t>(kCacheLine / sizeof(S));
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  std::int64_t c = 0;
  for (; c + 4 * kRun <= columns; c += 4 * kRun) {
    if constexpr (kAhead) {
      constexpr auto kDistance = kDotBytesAhead / static_cast<std::int64_t>(sizeof(S));
      for (std::int64_t at = 0; at < 4 * kRun; at += kLine) hwy::Prefetch(row + c + at + kDistance);
    }
    AddRun(d, row + c, x + c, s0, s1), AddRun(d, row + c + kRun, x + c + kRun, s1, s0);
    AddRun(d, row + c + 2 * kRun, x + c + 2 * kRun, s2, s3);
    AddRun(d, row + c + 3 * kRun, x + c + 3 * kRun, s3, s2);
  }
  for (; c + kRun <= columns; c += kRun) AddRun(d, row + c, x + c, s0, s1);
  T total = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
  ForTail<T, static_cast<std::size_t>(kRun) / 2>(columns, c, [&](auto tail, std::int64_t at) {
    const auto product = hn::Mul(LoadReal(tail, row + at), hn::LoadU(tail, x + at));
    total += hn::GetLane(hn::SumOfLanes(tail, product));
  });
  return total;
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_DOT_INL_H_
