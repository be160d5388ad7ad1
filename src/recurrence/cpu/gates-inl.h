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
  static constexpr float kHighest = 87.0f;    // e^-r stays normal: 1.6e-38
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low mantissa
  static constexpr float kLn2Hi = 0x1.62e400p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr int kMantissa = 23;
  static constexpr std::uint32_t kBias = 127;
  static constexpr int kDegree = 7;  // remainder 0.347^8/8! = 5e-9, a twelfth of half ulp
};

template <>
struct ExpConstants<double> {
  static constexpr double kHighest = 708.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static constexpr int kMantissa = 52;
  static constexpr std::uint64_t kBias = 1023;
  static constexpr int kDegree = 13;  // remainder 0.347^14/14! = 4e-18
};

/// Taylor polynomial of e^-y for |y| <= ln(2)/2, from its term of order kTerm on.
template <int kTerm, class D>
HWY_INLINE hn::Vec<D> DecaySeries(D d, hn::Vec<D> y) {
  constexpr auto coefficient = [] {
    double c = 1;
    for (int i = 1; i <= kTerm; ++i) c /= -i;
    return c;
  }();
  const auto term = hn::Set(d, static_cast<hn::TFromD<D>>(coefficient));
  if constexpr (kTerm == ExpConstants<hn::TFromD<D>>::kDegree) {
    return term;
  } else {
    return hn::MulAdd(y, DecaySeries<kTerm + 1>(d, y), term);
  }
}

template <class D>
struct Decay {
  hn::Vec<D> e, one_plus_e;
};

/// e = e^-r for r >= 0, within 2 ulp; above kHighest e^-kHighest, far under half an ulp of the 1 it
/// is added to. NaN stays NaN (hn::Exp makes it 0), but on the scalar target.
template <class D>
HWY_INLINE Decay<D> ExpDecay(D d, hn::Vec<D> r) {
  using T = hn::TFromD<D>;
  using K = ExpConstants<T>;
  const hn::RebindToUnsigned<D> du;
  r = hn::Min(hn::Set(d, K::kHighest), r);  // x86 returns the second operand if one is NaN
  const auto round = hn::Set(d, K::kRound);
  const auto shifted = hn::NegMulAdd(r, hn::Set(d, static_cast<T>(1.4426950408889634)), round);
  const auto n = hn::Sub(shifted, round);  // -r = n ln 2 - y
  auto y = hn::MulAdd(n, hn::Set(d, K::kLn2Hi), r);
  y = hn::MulAdd(n, hn::Set(d, K::kLn2Lo), y);
  const auto power = hn::BitCast(d, hn::Add(hn::ShiftLeft<K::kMantissa>(hn::BitCast(du, shifted)),
                                            hn::Set(du, K::kBias << K::kMantissa)));
  const auto series = DecaySeries<0>(d, y);
  return {hn::Mul(series, power), hn::MulAdd(series, power, hn::Set(d, T(1)))};
}

// ---------------------------------------------------------------- the simple gate

template <class D>
struct SigmoidGate {
  Real<D> a;     // σ(z)
  Real<D> rest;  // 1 - a without cancellation
};

template <class D>
HWY_INLINE SigmoidGate<D> MakeSigmoidGate(D d, Real<D> z) {
  const auto decay = ExpDecay(d, hn::Abs(z.re));
#if HWY_TARGET == HWY_SCALAR
  const auto one = hn::IfThenElse(hn::IsNaN(z.re), z.re, hn::Set(d, hn::TFromD<D>(1)));
#else
  const auto one = hn::Set(d, hn::TFromD<D>(1));
#endif
  const auto large = hn::Div(one, decay.one_plus_e);
  const auto small = hn::Mul(decay.e, large);
  const auto negative = hn::Lt(z.re, hn::Zero(d));
  return {{hn::IfThenElse(negative, small, large)}, {hn::IfThenElse(negative, large, small)}};
}

// ---------------------------------------------------------------- the polar gate

/// Where |z|² leaves [kLowest, kHighest] it overflows or loses bits: z is scaled by a power of two.
template <class T>
struct PolarConstants;
template <>
struct PolarConstants<float> {
  static constexpr float kLowest = 0x1p-100f, kHighest = 0x1p120f;
  static constexpr float kShrink = 0x1p-66f, kGrow = 0x1p90f;
  static constexpr float kLargest = 0x1p127f;
};
template <>
struct PolarConstants<double> {
  static constexpr double kLowest = 0x1p-900, kHighest = 0x1p1000;
  static constexpr double kShrink = 0x1p-530, kGrow = 0x1p600;
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

/// z with a lane too large, too small, zero or NaN. The scale is a power of two, so ordinary lanes
/// get the bits that MakePolarGate gives them.
template <class D>
HWY_NOINLINE void MakeScaledPolarGate(D d, const Complex<D>& z, PolarGate<D>& gate) {
  using T = hn::TFromD<D>;
  using K = PolarConstants<T>;
  const auto one = hn::Set(d, T(1));
  const auto square = hn::MulAdd(z.re, z.re, hn::Mul(z.im, z.im));
  const auto big = hn::Gt(square, hn::Set(d, K::kHighest));
  const auto small = hn::Lt(square, hn::Set(d, K::kLowest));
  const auto scale =
      hn::IfThenElse(big, hn::Set(d, K::kShrink), hn::IfThenElse(small, hn::Set(d, K::kGrow), one));
  const auto unscale = hn::IfThenElse(big, hn::Set(d, T(1) / K::kShrink),
                                      hn::IfThenElse(small, hn::Set(d, T(1) / K::kGrow), one));
  const auto x = hn::Mul(z.re, scale), y = hn::Mul(z.im, scale);
  const auto r = hn::Sqrt(hn::MulAdd(x, x, hn::Mul(y, y)));
  const auto zero = hn::Eq(r, hn::Zero(d));
  const auto decay = ExpDecay(d, hn::Mul(r, unscale));
  const auto f = hn::IfThenZeroElse(zero, hn::Div(one, hn::Mul(r, decay.one_plus_e)));
  gate.a = {hn::IfThenElse(zero, hn::Set(d, T(0.5)), hn::Mul(x, f)), hn::Mul(y, f)};
  gate.radial = hn::IfThenZeroElse(zero, decay.e);
  // 1/r of a subnormal r may overflow; 0 times it must stay 0.
  gate.tangential = hn::Min(hn::Mul(hn::Mul(hn::Mul(decay.one_plus_e, decay.one_plus_e), f), scale),
                            hn::Set(d, K::kLargest));
}

template <class D>
HWY_INLINE PolarGate<D> MakePolarGate(D d, Complex<D> z) {
  using T = hn::TFromD<D>;
  using K = PolarConstants<T>;
  const auto square = hn::MulAdd(z.re, z.re, hn::Mul(z.im, z.im));
  const auto ordinary =
      hn::And(hn::Ge(square, hn::Set(d, K::kLowest)), hn::Le(square, hn::Set(d, K::kHighest)));
  PolarGate<D> gate;
  if (HWY_LIKELY(hn::AllTrue(d, ordinary))) {
    const auto r = hn::Sqrt(square);
    const auto decay = ExpDecay(d, r);
    const auto f = hn::Div(hn::Set(d, T(1)), hn::Mul(r, decay.one_plus_e));
    gate.a = {hn::Mul(z.re, f), hn::Mul(z.im, f)};
    gate.radial = decay.e;
    gate.tangential = hn::Mul(hn::Mul(decay.one_plus_e, decay.one_plus_e), f);
  } else {
    MakeScaledPolarGate(d, z, gate);
  }
  return gate;
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATES_INL_H_
