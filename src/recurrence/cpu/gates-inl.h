// The gates: from a raw projection to a transition inside the unit disc.
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATES_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATES_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATES_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -87.0f;     // e^x stays normal: 1.6e-38
  static constexpr float kRound = 0x1.8p23f;   // adding it leaves round(x) in the low mantissa
  static constexpr float kLn2Hi = 0x1.62e400p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr int kMantissa = 23;
  static constexpr std::uint32_t kBias = 127;
  static constexpr int kDegree = 7;            // remainder 0.347^8/8! = 5e-9, a twelfth of half ulp
};

template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -708.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static constexpr int kMantissa = 52;
  static constexpr std::uint64_t kBias = 1023;
  static constexpr int kDegree = 13;           // remainder 0.347^14/14! = 4e-18
};

/// Taylor polynomial of e^x for |x| <= ln(2)/2.
template <int kTerm, int kDegree, class D>
HWY_INLINE hn::Vec<D> ExpSeries(D d, hn::Vec<D> x) {
  constexpr auto factorial = [](int n) {
    double f = 1;
    for (int i = 2; i <= n; ++i) f *= i;
    return f;
  };
  const auto coefficient = hn::Set(d, static_cast<hn::TFromD<D>>(1.0 / factorial(kTerm)));
  if constexpr (kTerm == kDegree) {
    return coefficient;
  } else {
    return hn::MulAdd(x, ExpSeries<kTerm + 1, kDegree>(d, x), coefficient);
  }
}

/// e^x for x <= 0, within 2 ulp; below kLowest e^kLowest, far under half an ulp of the 1 it is added
/// to. NaN stays NaN, which hn::Exp turns into 0.
template <class D>
HWY_INLINE hn::Vec<D> ExpNonPositive(D d, hn::Vec<D> x) {
  using T = hn::TFromD<D>;
  using K = ExpConstants<T>;
  const hn::RebindToUnsigned<D> du;
  const auto lowest = hn::Set(d, K::kLowest);
  x = hn::IfThenElse(hn::Lt(x, lowest), lowest, x);
  const auto round = hn::Set(d, K::kRound);
  const auto shifted = hn::MulAdd(x, hn::Set(d, static_cast<T>(1.4426950408889634)), round);
  const auto n = hn::Sub(shifted, round);
  auto y = hn::NegMulAdd(n, hn::Set(d, K::kLn2Hi), x);
  y = hn::NegMulAdd(n, hn::Set(d, K::kLn2Lo), y);
  const auto power = hn::Add(hn::ShiftLeft<K::kMantissa>(hn::BitCast(du, shifted)),
                             hn::Set(du, K::kBias << K::kMantissa));
  return hn::Mul(ExpSeries<0, K::kDegree>(d, y), hn::BitCast(d, power));
}

// ---------------------------------------------------------------- the simple gate

template <class D>
struct SigmoidGate {
  Real<D> a;         // σ(z)
  Real<D> rest;      // 1 - a without cancellation
};

template <class D>
HWY_INLINE SigmoidGate<D> MakeSigmoidGate(D d, Real<D> z) {
  const auto one = hn::Set(d, hn::TFromD<D>(1));
  const auto e = ExpNonPositive(d, hn::Neg(hn::Abs(z.re)));
  const auto large = hn::Div(one, hn::Add(one, e));
  const auto small = hn::Mul(e, large);
  const auto negative = hn::Lt(z.re, hn::Zero(d));
  return {{hn::IfThenElse(negative, small, large)}, {hn::IfThenElse(negative, large, small)}};
}

// ---------------------------------------------------------------- the polar gate

/// Where re² + im² overflows or loses bits, z is scaled by a power of two first.
template <class T>
struct PolarConstants;
template <>
struct PolarConstants<float> {
  static constexpr float kBig = 0x1p60f, kBigScale = 0x1p-66f;
  static constexpr float kSmall = 0x1p-60f, kSmallScale = 0x1p90f;
  static constexpr float kLargest = 0x1p127f;
};
template <>
struct PolarConstants<double> {
  static constexpr double kBig = 0x1p500, kBigScale = 0x1p-530;
  static constexpr double kSmall = 0x1p-500, kSmallScale = 0x1p600;
  static constexpr double kLargest = 0x1p1023;
};

/// a = σ(r) u, with r = |z| and u = z/r. With e = exp(-r), σ = 1/(1 + e) and σ' = e σ², the adjoint
///   dz = u (Re(G conj u) σ' + i Im(G conj u) σ/r)
///      = a (Re(G conj a) e + i Im(G conj a) (1 + e)/r)
/// needs neither u nor r nor a division.
template <class D>
struct PolarGate {
  Complex<D> a;
  hn::Vec<D> radial;      // e; 0 at z = 0
  hn::Vec<D> tangential;  // (1 + e)/r; 0 at z = 0
};

template <class D>
HWY_INLINE PolarGate<D> MakePolarGate(D d, Complex<D> z) {
  using T = hn::TFromD<D>;
  using K = PolarConstants<T>;
  const auto one = hn::Set(d, T(1));
  const auto largest = hn::Max(hn::Abs(z.re), hn::Abs(z.im));
  const auto big = hn::Gt(largest, hn::Set(d, K::kBig));
  const auto small = hn::Lt(largest, hn::Set(d, K::kSmall));
  const auto scale = hn::IfThenElse(
      big, hn::Set(d, K::kBigScale), hn::IfThenElse(small, hn::Set(d, K::kSmallScale), one));
  const auto unscale =
      hn::IfThenElse(big, hn::Set(d, T(1) / K::kBigScale),
                     hn::IfThenElse(small, hn::Set(d, T(1) / K::kSmallScale), one));
  const auto x = hn::Mul(z.re, scale), y = hn::Mul(z.im, scale);
  const auto r = hn::Sqrt(hn::MulAdd(x, x, hn::Mul(y, y)));
  const auto zero = hn::Eq(r, hn::Zero(d));

  const auto e = ExpNonPositive(d, hn::Neg(hn::Mul(r, unscale)));
  const auto denominator = hn::Add(one, e);
  const auto f = hn::IfThenZeroElse(zero, hn::Div(one, hn::Mul(r, denominator)));
  const auto tangential = hn::Mul(hn::Mul(denominator, denominator), hn::Mul(f, scale));
  return {{hn::IfThenElse(zero, hn::Set(d, T(0.5)), hn::Mul(x, f)), hn::Mul(y, f)},
          hn::IfThenZeroElse(zero, e),
          // 1/r of a subnormal r may overflow; 0 times it must stay 0.
          hn::Min(tangential, hn::Set(d, K::kLargest))};
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATES_INL_H_
