// What a Transformer does to a row beside products: norms, activations, sums.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "recurrence/cpu/gates-inl.h"
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_ROWS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_ROWS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_ROWS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class S>
void Widen(const S* from, std::int64_t n, Accumulation<S>* to) {
  ForEachVector<Accumulation<S>>(
      n, [&](auto d, std::int64_t c) HWY_ATTR { hn::StoreU(LoadReal(d, from + c), d, to + c); });
}

/// To the nearest.
inline void NarrowRow(const float* x, std::int64_t n, BFloat16* to) {
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    StoreReal(d, hn::LoadU(d, x + c), to + c, /*stream=*/false);
  });
}

template <class S>
void AddRow(const S* from, Accumulation<S>* to, std::int64_t n) {
  ForEachVector<Accumulation<S>>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    hn::StoreU(hn::Add(LoadReal(d, from + c), hn::LoadU(d, to + c)), d, to + c);
  });
}

template <class T>
void MultiplyRow(const T* from, T* to, std::int64_t n) {
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(d, from + c), hn::LoadU(d, to + c)), d, to + c);
  });
}

/// Σ f(d, c) over vectors of n numbers, in an order of its own.
template <class T, class F>
T SumOf(std::int64_t n, const F& f) {
  const hn::ScalableTag<T> whole;
  auto sums = hn::Zero(whole);
  T rest = 0;
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto value = f(d, c);
    if constexpr (IsWhole(decltype(d)())) {
      sums = hn::Add(sums, value);
    } else {
      rest += hn::GetLane(hn::SumOfLanes(d, value));
    }
  });
  return hn::GetLane(hn::SumOfLanes(whole, sums)) + rest;
}

/// The reference's ε, and in float16, where that is zero, the least positive number.
template <class S>
constexpr Accumulation<S> NormFloor() {
  return std::is_same_v<S, Float16> ? Accumulation<S>(0x1p-24) : Accumulation<S>(1e-12);
}

template <class T, class X>
T NormOf(const X* x, std::int64_t n) {
  return std::sqrt(SumOf<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto v = LoadReal(d, x + c);
    return hn::Mul(v, v);
  }));
}

/// √n / max(norm, ε); in this order a norm that is no number stays so.
template <class S>
Accumulation<S> ScaleOf(Accumulation<S> norm, std::int64_t n) {
  return std::sqrt(static_cast<Accumulation<S>>(n)) / std::max(norm, NormFloor<S>());
}

/// x / max(‖x‖, ε) √n gain. `to` may be x.
template <class S, class X>
void RmsNormRow(const X* x, const S* gain, std::int64_t n, X* to) {
  using T = Accumulation<S>;
  const T scale = ScaleOf<S>(NormOf<T>(x, n), n);
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto scaled = hn::Mul(LoadReal(d, x + c), hn::Set(d, scale));
    StoreReal(d, hn::Mul(scaled, LoadReal(d, gain + c)), to + c, /*stream=*/false);
  });
}

/// The mean of n numbers, and 1 / √(their variance + ε), ε being the 1e-5 of torch's LayerNorm.
template <class T>
std::pair<T, T> LayerStatistics(const T* x, std::int64_t n) {
  const T sum = SumOf<T>(n, [&](auto d, std::int64_t c) HWY_ATTR { return hn::LoadU(d, x + c); });
  const T mean = sum / static_cast<T>(n);
  const T squares = SumOf<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto apart = hn::Sub(hn::LoadU(d, x + c), hn::Set(d, mean));
    return hn::Mul(apart, apart);
  });
  return {mean, T(1) / std::sqrt(squares / static_cast<T>(n) + T(1e-5))};
}

/// torch's LayerNorm.
template <class S>
void LayerNormRow(const Accumulation<S>* x, const S* gain, const S* bias, std::int64_t n,
                  Accumulation<S>* to) {
  using T = Accumulation<S>;
  const std::pair<T, T> statistics = LayerStatistics(x, n);
  const T mean = statistics.first, scale = statistics.second;
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto apart = hn::Sub(hn::LoadU(d, x + c), hn::Set(d, mean));
    const auto scaled = hn::Mul(apart, hn::Set(d, scale));
    hn::StoreU(hn::MulAdd(scaled, LoadReal(d, gain + c), LoadReal(d, bias + c)), d, to + c);
  });
}

/// x σ(x) in place.
template <class T>
void Swish(T* x, std::int64_t n) {
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const Real<decltype(d)> value{hn::LoadU(d, x + c)};
    hn::StoreU(hn::Mul(value.re, MakeSigmoidGate(d, value).a.re), d, x + c);
  });
}

inline constexpr double kSqrtHalf = 0.707106781186547524;

/// erf(x)/x on [-kErfOne, kErfOne] as a quotient of polynomials in x², each from the constant term
/// on: of degree 5 both, its largest relative error is 1.9e-8, a third of half an ulp. Beyond, erf
/// rounds to 1. Fitted by weighted least squares in 40 digits.
inline constexpr float kErfOne = 3.92f;
inline constexpr float kErfAbove[] = {0x1.20dd74p+0f, 0x1.85f034p-3f,  0x1.b01c12p-5f,
                                      0x1.ed86acp-9f, 0x1.2ab616p-12f, 0x1.132940p-19f};
inline constexpr float kErfBelow[] = {1.0f,           0x1.010f50p-1f,  0x1.d36108p-4f,
                                      0x1.ea7db0p-7f, 0x1.30bb0cp-10f, 0x1.3f88c6p-15f};

template <class D>
HWY_INLINE hn::Vec<D> Polynomial(D d, const float (&coefficients)[6], hn::Vec<D> u) {
  auto sum = hn::Set(d, coefficients[5]);
  for (int k = 4; k >= 0; --k) sum = hn::MulAdd(sum, u, hn::Set(d, coefficients[k]));
  return sum;
}

/// Within 2 ulp in float32; in float64 the standard library's, lane by lane.
template <class D>
HWY_INLINE hn::Vec<D> Erf(D d, hn::Vec<D> x) {
  if constexpr (std::is_same_v<hn::TFromD<D>, double>) {
    HWY_ALIGN double lanes[HWY_MAX_BYTES / sizeof(double)];
    hn::StoreU(x, d, lanes);
    for (std::size_t i = 0; i < hn::Lanes(d); ++i) lanes[i] = std::erf(lanes[i]);
    return hn::LoadU(d, lanes);
  } else {
    const auto square = hn::Mul(x, x);
    const auto inner =
        hn::Div(hn::Mul(x, Polynomial(d, kErfAbove, square)), Polynomial(d, kErfBelow, square));
    // Beyond the bound the quotient differs from 1 by its rounding. A large factor would show it.
    const auto is_one = hn::Ge(hn::Abs(x), hn::Set(d, kErfOne));
    return hn::IfThenElse(is_one, hn::CopySign(hn::Set(d, 1.0f), x), inner);
  }
}

/// x Φ(x), Φ the normal distribution's.
template <class D>
HWY_INLINE hn::Vec<D> GeluValue(D d, hn::Vec<D> x) {
  using T = hn::TFromD<D>;
  const auto half = hn::Mul(x, hn::Set(d, T(0.5)));
  return hn::MulAdd(half, Erf(d, hn::Mul(x, hn::Set(d, T(kSqrtHalf)))), half);
}

/// Φ(x) + x φ(x), φ its density.
template <class D>
HWY_INLINE hn::Vec<D> GeluSlope(D d, hn::Vec<D> x) {
  using T = hn::TFromD<D>;
  constexpr double kDensityAtZero = 0.398942280401432678;  // 1/√(2π)
  const auto half = hn::Set(d, T(0.5));
  const auto below = hn::MulAdd(half, Erf(d, hn::Mul(x, hn::Set(d, T(kSqrtHalf)))), half);
  const auto exponent = hn::Mul(hn::Mul(x, x), half);
  const auto is_near = hn::Le(exponent, hn::Set(d, ExpConstants<T>::kHighest));
  const auto decay = hn::IfThenElseZero(is_near, ExpDecay(d, ClampDecay(d, exponent)).e);
  return hn::MulAdd(hn::Mul(x, hn::Set(d, T(kDensityAtZero))), decay, below);
}

/// In place.
template <class T>
void GeluRow(T* x, std::int64_t n) {
  ForEachVector<T>(n, [&](auto d, std::int64_t c)
                          HWY_ATTR { hn::StoreU(GeluValue(d, hn::LoadU(d, x + c)), d, x + c); });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_ROWS_INL_H_
