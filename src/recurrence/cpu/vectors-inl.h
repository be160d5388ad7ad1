// Vectors of real and complex channels: arithmetic, and loads and stores in every storage type.
// Included once per Highway target.
#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/half.h"

#if defined(GATELOOP_RECURRENCE_CPU_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_VECTORS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_VECTORS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_VECTORS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using BFloat16 = hwy::bfloat16_t;
using Float16 = hwy::float16_t;

/// The type that holds states and sums of a storage type.
template <class S>
using Accumulation = std::conditional_t<std::is_same_v<S, double>, double, float>;

/// f.template operator()<S>() with S the storage type of a dtype that is not complex.
template <class F>
void WithStorageOf(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
    case DType::kFloat16:
      return f.template operator()<Float16>();
    case DType::kComplex64:
    case DType::kComplex128:
      break;
  }
  throw_dtype(dtype);
}

// ---------------------------------------------------------------- values

/// One vector of real numbers; kParts counts the reals a channel takes in memory.
template <class D>
struct Real {
  static constexpr std::int64_t kParts = 1;
  hn::Vec<D> re;
};

/// One vector of complex numbers.
template <class D>
struct Complex {
  static constexpr std::int64_t kParts = 2;
  hn::Vec<D> re, im;
};

template <class D>
HWY_INLINE Real<D> Conj(D, Real<D> a) {
  return a;
}
template <class D>
HWY_INLINE Complex<D> Conj(D, Complex<D> a) {
  return {a.re, hn::Neg(a.im)};
}

template <class D>
HWY_INLINE Real<D> Add(D, Real<D> a, Real<D> b) {
  return {hn::Add(a.re, b.re)};
}
template <class D>
HWY_INLINE Complex<D> Add(D, Complex<D> a, Complex<D> b) {
  return {hn::Add(a.re, b.re), hn::Add(a.im, b.im)};
}

template <class D>
HWY_INLINE Real<D> Mul(D, Real<D> a, Real<D> b) {
  return {hn::Mul(a.re, b.re)};
}
template <class D>
HWY_INLINE Complex<D> Mul(D, Complex<D> a, Complex<D> b) {
  return {hn::MulSub(a.re, b.re, hn::Mul(a.im, b.im)), hn::MulAdd(a.re, b.im, hn::Mul(a.im, b.re))};
}

/// a b + c.
template <class D>
HWY_INLINE Real<D> MulAdd(D, Real<D> a, Real<D> b, Real<D> c) {
  return {hn::MulAdd(a.re, b.re, c.re)};
}
template <class D>
HWY_INLINE Complex<D> MulAdd(D, Complex<D> a, Complex<D> b, Complex<D> c) {
  return {hn::MulAdd(a.re, b.re, hn::NegMulAdd(a.im, b.im, c.re)),
          hn::MulAdd(a.re, b.im, hn::MulAdd(a.im, b.re, c.im))};
}
/// The same with c real.
template <class D>
HWY_INLINE Complex<D> MulAdd(D, Complex<D> a, Complex<D> b, Real<D> c) {
  return {hn::MulAdd(a.re, b.re, hn::NegMulAdd(a.im, b.im, c.re)),
          hn::MulAdd(a.re, b.im, hn::Mul(a.im, b.re))};
}

template <class V, class D>
HWY_INLINE V Zeros(D d) {
  if constexpr (V::kParts == 1) {
    return {hn::Zero(d)};
  } else {
    return {hn::Zero(d), hn::Zero(d)};
  }
}

template <class V, class D>
HWY_INLINE V Ones(D d) {
  V one = Zeros<V>(d);
  one.re = hn::Set(d, hn::TFromD<D>(1));
  return one;
}

// ---------------------------------------------------------------- one vector in memory

template <class D, class T>
HWY_INLINE hn::Vec<D> LoadReal(D d, const T* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadReal(D d, const BFloat16* p) {
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::Rebind<std::uint32_t, D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadReal(D d, const Float16* p) {
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(d, float_from_half(p->bits));
#else
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<Float16, D>(), p));
#endif
}

/// Past the cache if `stream`, which needs an aligned p; only whole vectors, because Highway
/// writes 16 bytes at least.
template <class D, class V, class T>
HWY_INLINE void StoreOrStream(D d, V v, T* p, bool stream, bool whole) {
  if (whole && stream) {
    hn::Stream(v, d, p);
  } else {
    hn::StoreU(v, d, p);
  }
}

template <class D>
constexpr bool IsWhole(D d) {
  return hn::MaxLanes(d) == hn::MaxLanes(hn::ScalableTag<hn::TFromD<D>>());
}

template <class D, class T>
HWY_INLINE void StoreReal(D d, hn::Vec<D> v, T* p, bool stream) {
  StoreOrStream(d, v, p, stream, IsWhole(d));
}

/// The nearest bfloat16, halves to even as in PyTorch (Highway 1.0.3 truncates): the upper halves.
template <class D>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> BFloat16Bits(D, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> d32;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7FFFu)));
  // Not Ne(v, v): Highway 1.0.3 compares with AVX-512 so that a NaN is not unequal to itself.
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
  return hn::IfThenElse(is_nan, hn::Set(d32, 0x7FC00000u), rounded);
}

template <class D>
HWY_INLINE void StoreReal(D d, hn::Vec<D> v, BFloat16* p, bool stream) {
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::Rebind<std::int32_t, D> di32;
  const auto upper = hn::BitCast(di32, hn::ShiftRight<16>(BFloat16Bits(d, v)));
  StoreOrStream(d16, hn::DemoteTo(d16, upper), reinterpret_cast<std::uint16_t*>(p), stream,
                IsWhole(D()));
}

template <class D>
HWY_INLINE void StoreReal(D, hn::Vec<D> v, Float16* p, bool stream) {
#if HWY_TARGET == HWY_SCALAR
  (void)stream;
  p->bits = half_from_float(hn::GetLane(v));
#else
  const hn::Rebind<Float16, D> d16;
  const hn::Rebind<std::uint16_t, D> du16;
  StoreOrStream(du16, hn::BitCast(du16, hn::DemoteTo(d16, v)), reinterpret_cast<std::uint16_t*>(p),
                stream, IsWhole(D()));
#endif
}

// ---------------------------------------------------------------- (re, im) pairs

#if HWY_TARGET == HWY_SCALAR  // its vectors have one lane and no shuffles

template <class D>
HWY_INLINE Complex<D> Deinterleave(D, hn::Vec<D> lo, hn::Vec<D> hi) {
  return {lo, hi};
}
template <class D>
HWY_INLINE void Interleave(D, Complex<D> v, hn::Vec<D>& lo, hn::Vec<D>& hi) {
  lo = v.re;
  hi = v.im;
}

#else

/// Splits the pairs in (lo, hi) into real and imaginary parts.
template <class D>
HWY_INLINE Complex<D> Deinterleave(D d, hn::Vec<D> lo, hn::Vec<D> hi) {
  if constexpr (hn::MaxLanes(D()) == 1) {
    return {lo, hi};
  } else {
    return {hn::ConcatEven(d, hi, lo), hn::ConcatOdd(d, hi, lo)};
  }
}

/// The inverse: `lo` and `hi` hold the pairs.
template <class D>
HWY_INLINE void Interleave(D d, Complex<D> v, hn::Vec<D>& lo, hn::Vec<D>& hi) {
  constexpr std::size_t kBytes = hn::MaxLanes(D()) * sizeof(hn::TFromD<D>);
  if constexpr (hn::MaxLanes(D()) == 1) {
    lo = v.re;
    hi = v.im;
  } else if constexpr (kBytes <= 16) {
    lo = hn::InterleaveLower(d, v.re, v.im);
    hi = hn::InterleaveUpper(d, v.re, v.im);
  } else {
    // Interleaving works inside 16-byte blocks. Block b first gets, in 8-byte units, unit b of the
    // lower half and unit b of the upper half: 4 shuffles a pair, against 6 in StoreInterleaved2.
    alignas(64) static constexpr std::int64_t kOrder[2][8] = {{0, 2, 1, 3},
                                                              {0, 4, 1, 5, 2, 6, 3, 7}};
    const hn::Repartition<double, D> d64;
    const auto order = hn::SetTableIndices(d64, kOrder[kBytes == 64]);
    const auto re = hn::BitCast(d, hn::TableLookupLanes(hn::BitCast(d64, v.re), order));
    const auto im = hn::BitCast(d, hn::TableLookupLanes(hn::BitCast(d64, v.im), order));
    lo = hn::InterleaveLower(d, re, im);
    hi = hn::InterleaveUpper(d, re, im);
  }
}

#endif

/// Channels c .. c + Lanes(d) of a row of V values, where `row` points at channel 0.
template <class V, class D, class T>
HWY_INLINE V Load(D d, const T* row, std::int64_t c) {
  if constexpr (V::kParts == 1) {
    return {LoadReal(d, row + c)};
  } else {
    const T* p = row + 2 * c;
    return Deinterleave(d, LoadReal(d, p), LoadReal(d, p + hn::MaxLanes(d)));
  }
}

template <class D, class T>
HWY_INLINE void Store(D d, Real<D> v, T* row, std::int64_t c, bool stream = false) {
  StoreReal(d, v.re, row + c, stream);
}
template <class D, class T>
HWY_INLINE void Store(D d, Complex<D> v, T* row, std::int64_t c, bool stream = false) {
  hn::Vec<D> lo, hi;
  Interleave(d, v, lo, hi);
  StoreReal(d, lo, row + 2 * c, stream);
  StoreReal(d, hi, row + 2 * c + hn::MaxLanes(d), stream);
}

/// The same for a row with its real and imaginary parts apart, `plane` numbers from each other:
/// what stays on the core is kept so, because a pair costs four shuffles to take apart and join.
template <class V, class D, class T>
HWY_INLINE V LoadPlanar(D d, const T* row, std::int64_t plane, std::int64_t c) {
  if constexpr (V::kParts == 1) {
    return {hn::LoadU(d, row + c)};
  } else {
    return {hn::LoadU(d, row + c), hn::LoadU(d, row + plane + c)};
  }
}
template <class D, class T>
HWY_INLINE void StorePlanar(D d, Real<D> v, T* row, std::int64_t, std::int64_t c) {
  hn::StoreU(v.re, d, row + c);
}
template <class D, class T>
HWY_INLINE void StorePlanar(D d, Complex<D> v, T* row, std::int64_t plane, std::int64_t c) {
  hn::StoreU(v.re, d, row + c);
  hn::StoreU(v.im, d, row + plane + c);
}

// ---------------------------------------------------------------- rows of channels

/// Calls f(d, c) for whole vectors, then for halves, quarters, ... of one: no masks, and no lane
/// read out of bounds. Every lane executes the same instructions in every size, so the bits are the
/// same.
template <class T, std::size_t kLanes, class F>
HWY_INLINE void ForTail(std::int64_t channels, std::int64_t c, const F& f) {
  if constexpr (kLanes > 0) {
    if (c + static_cast<std::int64_t>(kLanes) <= channels) {
      f(hn::CappedTag<T, kLanes>(), c);
      c += static_cast<std::int64_t>(kLanes);
    }
    ForTail<T, kLanes / 2>(channels, c, f);
  }
}
/// kDown: from the last channel to the first. Rows visited from the last to the first are then one
/// stream running down through memory, which hardware prefetchers follow.
template <class T, bool kDown = false, class F>
HWY_INLINE void ForEachVector(std::int64_t channels, const F& f) {
  const hn::ScalableTag<T> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  const std::int64_t whole = channels / kLanes * kLanes;
  if constexpr (kDown) {
    ForTail<T, kLanes / 2>(channels, whole, f);
    for (std::int64_t c = whole - kLanes; c >= 0; c -= kLanes) f(d, c);
  } else {
    for (std::int64_t c = 0; c < whole; c += kLanes) f(d, c);
    ForTail<T, kLanes / 2>(channels, whole, f);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_VECTORS_INL_H_
