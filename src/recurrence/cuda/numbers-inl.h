#pragma once

/// Storage types, real and complex numbers, and the monoid of the recurrence, for host and device.
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define GATELOOP_HD __host__ __device__ __forceinline__
#else
#define GATELOOP_HD inline
#endif
#if defined(__CUDA_ARCH__)  // arrays that a loop indexes are registers only where it is unrolled
#define GATELOOP_UNROLL _Pragma("unroll")
#else
#define GATELOOP_UNROLL
#endif

#include "recurrence/cpu/half.h"

namespace gateloop::recurrence::cuda {

// ---------------------------------------------------------------- storage

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class S>
using Accumulation = std::conditional_t<std::is_same_v<S, double>, double, float>;

/// What one thread reads or writes at once: adjacent numbers, in one access where they are aligned
/// to their size.
template <class S, int kCount, bool kPacked = sizeof(S) == 2 && kCount % 2 == 0>
struct alignas(sizeof(S) * kCount) Lane {
  S numbers[kCount];
  GATELOOP_HD S get(int i) const { return numbers[i]; }
  GATELOOP_HD void set(int i, S number) { numbers[i] = number; }
};
/// Pairs of 16-bit numbers stay in one register each.
template <class S, int kCount>
struct alignas(sizeof(S) * kCount) Lane<S, kCount, true> {
  std::uint32_t words[kCount / 2];
  GATELOOP_HD S get(int i) const {
    return {static_cast<std::uint16_t>(words[i / 2] >> (i % 2 * 16))};
  }
  GATELOOP_HD void set(int i, S number) {
    const std::uint32_t other = words[i / 2] & (i % 2 == 0 ? 0xFFFF0000u : 0x0000FFFFu);
    words[i / 2] = other | static_cast<std::uint32_t>(number.bits) << (i % 2 * 16);
  }
};

GATELOOP_HD float widen(float value) { return value; }
GATELOOP_HD double widen(double value) { return value; }
GATELOOP_HD float widen(BFloat16 value) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
#else
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
#endif
}
GATELOOP_HD float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return cpu::float_from_half(value.bits);
#endif
}

/// Rounds to nearest even.
template <class S>
GATELOOP_HD S narrow(Accumulation<S> value) {
  return value;
}
template <>
GATELOOP_HD BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
  return {static_cast<std::uint16_t>(std::isnan(value) ? 0x7FFFu : rounded >> 16)};
#endif
}
template <>
GATELOOP_HD Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return {cpu::half_from_float(value)};
#endif
}

// ---------------------------------------------------------------- numbers

template <class T>
struct Real {
  using Scalar = T;
  static constexpr int kParts = 1;
  T re;
};
template <class T>
struct Complex {
  using Scalar = T;
  static constexpr int kParts = 2;
  T re, im;
};

/// Every product that is added to is fused by name: the compiler contracts nothing
/// (-fmad=false), so a fold gives the same bits wherever it is compiled.
template <class T>
GATELOOP_HD Real<T> mul(Real<T> a, Real<T> b) {
  return {a.re * b.re};
}
template <class T>
GATELOOP_HD Complex<T> mul(Complex<T> a, Complex<T> b) {
  return {std::fma(a.re, b.re, -(a.im * b.im)), std::fma(a.re, b.im, a.im * b.re)};
}
/// a b + c
template <class T>
GATELOOP_HD Real<T> mul_add(Real<T> a, Real<T> b, Real<T> c) {
  return {std::fma(a.re, b.re, c.re)};
}
template <class T>
GATELOOP_HD Complex<T> mul_add(Complex<T> a, Complex<T> b, Complex<T> c) {
  return {std::fma(a.re, b.re, std::fma(-a.im, b.im, c.re)),
          std::fma(a.re, b.im, std::fma(a.im, b.re, c.im))};
}
template <class T>
GATELOOP_HD Real<T> conj(Real<T> a) {
  return a;
}
template <class T>
GATELOOP_HD Complex<T> conj(Complex<T> a) {
  return {a.re, -a.im};
}
template <class T>
GATELOOP_HD Real<T> add(Real<T> a, Real<T> b) {
  return {a.re + b.re};
}
template <class T>
GATELOOP_HD Complex<T> add(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
struct From;
template <class T>
struct From<Real<T>> {
  static GATELOOP_HD Real<T> real(T re) { return {re}; }
  /// Channel c of a lane.
  template <class S, int kCount>
  static GATELOOP_HD Real<T> lane(const Lane<S, kCount>& lane, int c) {
    return {widen(lane.get(c))};
  }
};
template <class T>
struct From<Complex<T>> {
  static GATELOOP_HD Complex<T> real(T re) { return {re, T(0)}; }
  template <class S, int kCount>
  static GATELOOP_HD Complex<T> lane(const Lane<S, kCount>& lane, int c) {
    return {widen(lane.get(2 * c)), widen(lane.get(2 * c + 1))};
  }
};
template <class T, class S, int kCount>
GATELOOP_HD void put(Real<T> value, Lane<S, kCount>& lane, int c) {
  lane.set(c, narrow<S>(value.re));
}
template <class T, class S, int kCount>
GATELOOP_HD void put(Complex<T> value, Lane<S, kCount>& lane, int c) {
  lane.set(2 * c, narrow<S>(value.re));
  lane.set(2 * c + 1, narrow<S>(value.im));
}

// ---------------------------------------------------------------- the monoid

/// The map h ↦ a h + x: a step, or what a run of steps does to the state before it.
template <class V>
struct Affine {
  V a, x;
  static GATELOOP_HD Affine identity() {
    using T = typename V::Scalar;
    return {From<V>::real(T(1)), From<V>::real(T(0))};
  }
};

/// `first`, then `next`.
template <class V>
GATELOOP_HD Affine<V> compose(const Affine<V>& first, const Affine<V>& next) {
  return {mul(next.a, first.a), mul_add(next.a, first.x, next.x)};
}
template <class V>
GATELOOP_HD V apply(const Affine<V>& map, V state) {
  return mul_add(map.a, state, map.x);
}

}  // namespace gateloop::recurrence::cuda
