// Sums of the lanes of several vectors together, which takes fewer shuffles than one by one.
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_SUMS_OF_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_SUMS_OF_LANES_INL_H_
#undef GATELOOP_RECURRENCE_CPU_SUMS_OF_LANES_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_SUMS_OF_LANES_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreSumsOfLanes(D, V a, V b, V c, V e, float* to) {
  to[0] = hn::GetLane(a), to[1] = hn::GetLane(b), to[2] = hn::GetLane(c), to[3] = hn::GetLane(e);
}

#else

/// The sum of the blocks of 4 lanes of a vector to `to`.
template <class D>
HWY_INLINE void StoreSumOfBlocks(D d, hn::Vec<D> v, float* to) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    StoreSumOfBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  } else {
    hn::StoreU(v, d, to);
  }
}

/// The sums of the lanes of four vectors to to[0 .. 3].
template <class D, class V = hn::Vec<D>>
HWY_INLINE void StoreSumsOfLanes(D d, V a, V b, V c, V e, float* to) {
  const hn::Repartition<double, D> pairs;
  const auto ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const auto ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto ab2 = hn::BitCast(pairs, ab), ce2 = hn::BitCast(pairs, ce);
  StoreSumOfBlocks(d,
                   hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, ab2, ce2)),
                           hn::BitCast(d, hn::InterleaveUpper(pairs, ab2, ce2))),
                   to);
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_SUMS_OF_LANES_INL_H_
