// What a Transformer does to a row beside products: norms, activations, sums.
#include <algorithm>
#include <cmath>
#include <iterator>

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

/// torch's LayerNorm with its ε of 1e-5.
template <class S>
void LayerNormRow(const Accumulation<S>* x, const S* gain, const S* bias, std::int64_t n,
                  Accumulation<S>* to) {
  using T = Accumulation<S>;
  const T sum = SumOf<T>(n, [&](auto d, std::int64_t c) HWY_ATTR { return hn::LoadU(d, x + c); });
  const T mean = sum / static_cast<T>(n);
  const T squares = SumOf<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto apart = hn::Sub(hn::LoadU(d, x + c), hn::Set(d, mean));
    return hn::Mul(apart, apart);
  });
  const T scale = T(1) / std::sqrt(squares / static_cast<T>(n) + T(1e-5));
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

/// x Φ(x) in place, Φ the normal distribution's.
inline void Gelu(float* x, std::int64_t n) {
  constexpr float kSqrtHalf = 0.70710678f;
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto value = hn::LoadU(d, x + c);
    const auto bound = hn::Set(d, kErfOne), one = hn::Set(d, 1.0f);
    const auto r = hn::Mul(value, hn::Set(d, kSqrtHalf));
    const auto u = hn::Mul(r, r);
    const auto inner =
        hn::Div(hn::Mul(r, Polynomial(d, kErfAbove, u)), Polynomial(d, kErfBelow, u));
    // The quotient is 1 but for its rounding near the bound, which a large x would magnify.
    const auto erf = hn::IfThenElse(hn::Ge(hn::Abs(r), bound), hn::CopySign(one, r), inner);
    const auto half = hn::Mul(value, hn::Set(d, 0.5f));
    hn::StoreU(hn::MulAdd(half, erf, half), d, x + c);
  });
}
inline void Gelu(double* x, std::int64_t n) {
  for (std::int64_t c = 0; c < n; ++c) x[c] *= 0.5 * (1 + std::erf(x[c] * std::sqrt(0.5)));
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_ROWS_INL_H_
