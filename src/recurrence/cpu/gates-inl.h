// The gates: from a raw projection to a transition inside the unit disc.
#include <iterator>
#include <limits>

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

/// kSeries: minimax polynomial of e^-y - 1 over |y| <= ln(2)/2, divided by y. Its relative error to
/// e^-y is 2.6e-9 in float32, a 23rd of half an ulp. In float64 it is 1.8e-17, a sixth of half an
/// ulp.
template <>
struct ExpConstants<float> {
  static constexpr float kHighest = 87.0f;    // e^-r stays normal: 1.6e-38
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low mantissa
  static constexpr float kLn2Hi = 0x1.62e400p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr int kMantissa = 23;
  static constexpr std::uint32_t kBias = 127;
  static constexpr float kSeries[] = {-1.0f,          0x1.000002p-1f,  -0x1.5553cp-3f,
                                      0x1.55515ep-5f, -0x1.129052p-7f, 0x1.709baap-10f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kHighest = 708.0;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2Hi = 0x1.62e42feep-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static constexpr int kMantissa = 52;
  static constexpr std::uint64_t kBias = 1023;
  static constexpr double kSeries[] = {
      -0x1.0000000000003p+0,  0x1.0000000000005p-1,  -0x1.5555555554825p-3,  0x1.55555555520edp-5,
      -0x1.111111137a35p-7,   0x1.6c16c17f35aafp-10, -0x1.a019f624dccc3p-13, 0x1.a019a68ff59cfp-16,
      -0x1.71f610b693ddap-19, 0x1.28a29f2174a1ap-22, -0x1.8ad03a702a2bdp-26};
};

/// The series from coefficient k on. Pairs of terms make the chain half as long: latency is what a
/// gate costs, because a core executes only some 5 vectors ahead.
template <std::size_t k, class D>
HWY_INLINE hn::Vec<D> DecaySeries(D d, hn::Vec<D> y, hn::Vec<D> square) {
  constexpr auto& c = ExpConstants<hn::TFromD<D>>::kSeries;
  if constexpr (k + 1 == std::size(c)) {
    return hn::Set(d, c[k]);
  } else {
    const auto pair = hn::MulAdd(y, hn::Set(d, c[k + 1]), hn::Set(d, c[k]));
    if constexpr (k + 2 == std::size(c)) {
      return pair;
    } else {
      return hn::MulAdd(square, DecaySeries<k + 2>(d, y, square), pair);
    }
  }
}

template <class D>
struct Decay {
  hn::Vec<D> e, one_plus_e;
};

/// e = e^-r for |r| <= kHighest, within 2 ulp.
template <class D>
HWY_INLINE Decay<D> ExpDecay(D d, hn::Vec<D> r) {
  using T = hn::TFromD<D>;
  using K = ExpConstants<T>;
  const hn::RebindToUnsigned<D> du;
  const auto one = hn::Set(d, T(1)), round = hn::Set(d, K::kRound);
  const auto shifted = hn::NegMulAdd(r, hn::Set(d, static_cast<T>(1.4426950408889634)), round);
  const auto n = hn::Sub(shifted, round);  // -r = n ln 2 - y
  auto y = hn::MulAdd(n, hn::Set(d, K::kLn2Hi), r);
  y = hn::MulAdd(n, hn::Set(d, K::kLn2Lo), y);
  const auto power = hn::BitCast(d, hn::Add(hn::ShiftLeft<K::kMantissa>(hn::BitCast(du, shifted)),
                                            hn::Set(du, K::kBias << K::kMantissa)));
  const auto series = hn::MulAdd(y, DecaySeries<0>(d, y, hn::Mul(y, y)), one);
  return {hn::Mul(series, power), hn::MulAdd(series, power, one)};
}

/// min(r, kHighest): beyond it e^-r is far under half an ulp of the 1 it is added to. NaN stays
/// NaN, for x86 returns the second operand if one is NaN, but not on the scalar target.
template <class D>
HWY_INLINE hn::Vec<D> ClampDecay(D d, hn::Vec<D> r) {
  return hn::Min(hn::Set(d, ExpConstants<hn::TFromD<D>>::kHighest), r);
}

// ---------------------------------------------------------------- the simple gate

template <class D>
struct SigmoidGate {
  Real<D> a;     // σ(z)
  Real<D> rest;  // 1 - a without cancellation
};

/// With e = e^-z, a = 1/(1 + e) and 1 - a = e a: neither cancels, whatever the sign of z.
template <class D>
HWY_INLINE SigmoidGate<D> MakeSigmoidGate(D d, Real<D> z) {
  using T = hn::TFromD<D>;
  const auto lowest = hn::Set(d, -ExpConstants<T>::kHighest);
  const auto decay = ExpDecay(d, hn::Max(lowest, ClampDecay(d, z.re)));
#if HWY_TARGET == HWY_SCALAR
  const auto one = hn::IfThenElse(hn::IsNaN(z.re), z.re, hn::Set(d, T(1)));
#else
  const auto one = hn::Set(d, T(1));
#endif
  const auto a = hn::Div(one, decay.one_plus_e);
  return {{a}, {hn::Mul(decay.e, a)}};
}

// ---------------------------------------------------------------- the polar gate

/// Where |z| leaves [kLowest, kHighest] its square overflows or loses bits: z is scaled by a power
/// of two.
template <class T>
struct PolarConstants;
template <>
struct PolarConstants<float> {
  static constexpr float kLowest = 0x1p-50f, kHighest = 0x1p60f;
  static constexpr float kShrink = 0x1p-66f, kGrow = 0x1p90f;
  static constexpr float kLargest = 0x1p127f;
  static constexpr std::uint32_t kMantissa = (std::uint32_t{1} << 23) - 1;
};
template <>
struct PolarConstants<double> {
  static constexpr double kLowest = 0x1p-450, kHighest = 0x1p500;
  static constexpr double kShrink = 0x1p-530, kGrow = 0x1p600;
  static constexpr double kLargest = 0x1p1023;
  static constexpr std::uint64_t kMantissa = (std::uint64_t{1} << 52) - 1;
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

/// |z|, or anything outside [kLowest, kHighest] where that takes scaling.
template <class D>
HWY_INLINE hn::Vec<D> Radius(D, Complex<D> z) {
  return hn::Sqrt(hn::MulAdd(z.re, z.re, hn::Mul(z.im, z.im)));
}

/// x kGrow, exactly, also for a subnormal x that arithmetic reads as zero. Such an x has a sign and
/// n mantissa bits m: it is m 2^-n times the least normal number. 1 + m 2^-n is the float of
/// exponent 0 with the mantissa m.
template <class D>
HWY_INLINE hn::Vec<D> Grow(D d, hn::Vec<D> x) {
  using T = hn::TFromD<D>;
  using K = PolarConstants<T>;
  const auto one = hn::Set(d, T(1)), least = hn::Set(d, std::numeric_limits<T>::min());
  const auto mantissa =
      hn::And(x, hn::BitCast(d, hn::Set(hn::RebindToUnsigned<D>(), K::kMantissa)));
  const auto fraction = hn::Sub(hn::Or(mantissa, one), one);  // |x| / least
  const auto grown = hn::Mul(fraction, hn::Set(d, std::numeric_limits<T>::min() * K::kGrow));
  return hn::IfThenElse(hn::Lt(hn::Abs(x), least), hn::CopySign(grown, x),
                        hn::Mul(x, hn::Set(d, K::kGrow)));
}

/// z with a lane too large, too small, zero or NaN. The scale is a power of two, so ordinary lanes
/// get the bits that MakePolarGate gives them.
template <class D>
HWY_NOINLINE void MakeScaledPolarGate(D d, hn::Vec<D> re, hn::Vec<D> im, PolarGate<D>& gate) {
  using T = hn::TFromD<D>;
  using K = PolarConstants<T>;
  const auto one = hn::Set(d, T(1));
  const auto radius = Radius(d, Complex<D>{re, im});
  const auto big = hn::Gt(radius, hn::Set(d, K::kHighest));
  const auto small = hn::Lt(radius, hn::Set(d, K::kLowest));
  const auto scale =
      hn::IfThenElse(big, hn::Set(d, K::kShrink), hn::IfThenElse(small, hn::Set(d, K::kGrow), one));
  const auto unscale = hn::IfThenElse(big, hn::Set(d, T(1) / K::kShrink),
                                      hn::IfThenElse(small, hn::Set(d, T(1) / K::kGrow), one));
  const auto x = hn::IfThenElse(small, Grow(d, re), hn::Mul(re, scale));
  const auto y = hn::IfThenElse(small, Grow(d, im), hn::Mul(im, scale));
  const auto r = Radius(d, Complex<D>{x, y});
  const auto zero = hn::Eq(r, hn::Zero(d));
  const auto decay = ExpDecay(d, ClampDecay(d, hn::Mul(r, unscale)));
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
  const auto r = Radius(d, z);
  const auto ordinary =
      hn::And(hn::Ge(r, hn::Set(d, K::kLowest)), hn::Le(r, hn::Set(d, K::kHighest)));
  if (HWY_UNLIKELY(!hn::AllTrue(d, ordinary))) {
    PolarGate<D> gate;  // apart: what is passed by reference stays in memory
    MakeScaledPolarGate(d, z.re, z.im, gate);
    return gate;
  }
  const auto decay = ExpDecay(d, ClampDecay(d, r));
  const auto f = hn::Div(hn::Set(d, T(1)), hn::Mul(r, decay.one_plus_e));
  return {{hn::Mul(z.re, f), hn::Mul(z.im, f)},
          decay.e,
          hn::Mul(hn::Mul(decay.one_plus_e, decay.one_plus_e), f)};
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATES_INL_H_
