#pragma once

/// The gates: from a raw projection to a transition inside the unit disc.
#include <cmath>
#include <type_traits>

#include "recurrence/cuda/numbers-inl.h"

namespace gateloop::recurrence::cuda {

/// 1/x of a normal x, within a unit in the last place. Division as IEEE has it branches for
/// subnormals, which keeps the device from working on several steps at once.
template <class T>
GATELOOP_HD T reciprocal(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
#endif
  return T(1) / x;
}
/// 1/√x of a normal x, within two units in the last place; see reciprocal().
template <class T>
GATELOOP_HD T reciprocal_root(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
#endif
  return T(1) / std::sqrt(x);
}

/// exp(x) of an x that is stored as S. Of 16-bit numbers, |x| is exact to 2^-8 or 2^-11 at best.
/// The error of the device's instruction, |x| 2^-24, is next to nothing beside that.
template <class S, class T>
GATELOOP_HD T exponential(T x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 2) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
    return result;
  }
#endif
  return std::exp(x);
}

template <class T>
struct SigmoidGate {
  T a;     // σ(z)
  T rest;  // 1 - a without cancellation
};

/// With e = e^-|z|, the larger of the two is 1/(1 + e) and the other e times that.
template <class S, class T = Accumulation<S>>
GATELOOP_HD SigmoidGate<T> sigmoid_gate(T z) {
  const T e = exponential<S>(-std::fabs(z));
  const T larger = reciprocal(T(1) + e);
  const T smaller = e * larger;
  return z < T(0) ? SigmoidGate<T>{smaller, larger} : SigmoidGate<T>{larger, smaller};
}

/// Where a part of z leaves [kLowest, kHighest] its square overflows or loses bits: z is scaled by
/// a power of two.
template <class T>
struct PolarLimits;
template <>
struct PolarLimits<float> {
  static constexpr float kLowest = 0x1p-50f, kHighest = 0x1p60f;
  static constexpr float kShrink = 0x1p-66f, kGrow = 0x1p90f;
  static constexpr float kLargest = 0x1p127f;
};
template <>
struct PolarLimits<double> {
  static constexpr double kLowest = 0x1p-450, kHighest = 0x1p500;
  static constexpr double kShrink = 0x1p-530, kGrow = 0x1p600;
  static constexpr double kLargest = 0x1p1023;
};

/// a = σ(r) u, with r = |z| and u = z/r. With e = exp(-r), σ = 1/(1 + e) and σ' = e σ², the adjoint
///   dz = u (Re(G conj u) σ' + i Im(G conj u) σ/r)
///      = a (Re(G conj a) e + i Im(G conj a) (1 + e)/r)
/// needs neither u nor r.
template <class T>
struct PolarGate {
  Complex<T> a;  // 0.5 at z = 0
  T radial;      // e; 0 at z = 0
  T tangential;  // (1 + e)/r; 0 at z = 0
};

template <class S, class T = Accumulation<S>>
GATELOOP_HD PolarGate<T> polar_gate(Complex<T> z) {
  using K = PolarLimits<T>;
  const T larger = std::fmax(std::fabs(z.re), std::fabs(z.im));
  const bool big = larger > K::kHighest, small = larger < K::kLowest;
  const T scale = big ? K::kShrink : small ? K::kGrow : T(1);
  const T unscale = big ? T(1) / K::kShrink : small ? T(1) / K::kGrow : T(1);
  const T x = z.re * scale, y = z.im * scale;
  const T square = std::fma(x, x, y * y);
  const bool zero = square == T(0);
  const T inverse = zero ? T(0) : reciprocal_root(square);  // of r, scaled
  const T e = exponential<S>(-(square * inverse * unscale));
  const T f = inverse * reciprocal(T(1) + e);
  const T tangential = (T(1) + e) * inverse * scale;
  // Without a branch, as all before it. 1/r of a subnormal r may overflow; 0 times it must stay 0.
  return {{zero ? T(0.5) : x * f, y * f},
          zero ? T(0) : e,
          tangential > K::kLargest ? K::kLargest : tangential};
}

}  // namespace gateloop::recurrence::cuda
