// The oracle's adjoints against central differences of its own forward passes, and its algebra.
#include "oracle.h"

#include <gtest/gtest.h>

#include <functional>

#include "harness.h"

namespace gateloop::testing {
namespace {

constexpr Dims kDims{2, 5, 3};
// Central differences in double: truncation h²/6 ~ 2e-11, rounding 1e-16/h ~ 1e-11, values ~ 1.
constexpr double kStep = 1e-5;
constexpr Tolerance kDifferences{1e-8, 0};

double dot(const Array<double>& a, const Array<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
/// Re<a, b>: the loss whose gradient by a is b in the conjugate convention.
double dot(const Array<Complex>& a, const Array<Complex>& b) { return dot(flatten(a), flatten(b)); }

Array<double> differences(Array<double> at, const std::function<double(const Array<double>&)>& f) {
  Array<double> gradient(at.size());
  for (std::size_t i = 0; i < at.size(); ++i) {
    const double x = at[i];
    at[i] = x + kStep;
    const double high = f(at);
    at[i] = x - kStep;
    gradient[i] = (high - f(at)) / (2 * kStep);
    at[i] = x;
  }
  return gradient;
}
/// d/dRe + i d/dIm.
Array<Complex> differences(const Array<Complex>& at,
                           const std::function<double(const Array<Complex>&)>& f) {
  return pair_up(differences(flatten(at), [&](const Array<double>& x) { return f(pair_up(x)); }));
}

template <class N>
Array<N> numbers(Random& random, std::size_t n) {
  if constexpr (std::is_same_v<N, double>) {
    return random.normal(n);
  } else {
    return random.complex_normal(n);
  }
}

template <class N>
void check_linear(bool reverse) {
  Random random(1);
  const auto a = numbers<N>(random, elements(kDims)), x = numbers<N>(random, elements(kDims)),
             initial = numbers<N>(random, states(kDims));
  const auto dh = numbers<N>(random, elements(kDims)), dfinal = numbers<N>(random, states(kDims));
  const auto loss = [&](const Array<N>& a, const Array<N>& x, const Array<N>& initial) {
    const auto out = oracle::linear_recurrence(kDims, reverse, a, x, initial);
    return dot(out.h, dh) + dot(out.final_state, dfinal);
  };
  const auto h = oracle::linear_recurrence(kDims, reverse, a, x, initial).h;
  const auto g = oracle::linear_recurrence_backward(kDims, reverse, a, h, initial, dh, dfinal);
  using F = Array<N>;
  expect_near(g.da, differences(a, [&](const F& v) { return loss(v, x, initial); }), kDifferences,
              "da");
  expect_near(g.dx, differences(x, [&](const F& v) { return loss(a, v, initial); }), kDifferences,
              "dx");
  expect_near(g.dinitial, differences(initial, [&](const F& v) { return loss(a, x, v); }),
              kDifferences, "dinitial");
}

TEST(Oracle, LinearRecurrenceAdjoint) {
  for (const bool reverse : {false, true}) {
    check_linear<double>(reverse);
    check_linear<Complex>(reverse);
  }
}

TEST(Oracle, PolarGateLoopAdjoint) {
  for (const bool reverse : {false, true}) {
    Random random(2);
    const std::size_t n = elements(kDims);
    const oracle::PolarGateLoopInputs in{random.normal(n), random.normal(n), random.normal(n),
                                         random.complex_normal(n),
                                         random.complex_normal(states(kDims))};
    const auto dy = random.normal(n);
    const auto dfinal = random.complex_normal(states(kDims));
    const auto loss = [&](const oracle::PolarGateLoopInputs& in) {
      const auto out = oracle::polar_gate_loop(kDims, reverse, in);
      return dot(out.y, dy) + dot(out.final_state, dfinal);
    };
    const auto by = [&](auto oracle::PolarGateLoopInputs::*field) {
      using F = std::remove_cvref_t<decltype(in.*field)>;
      return differences(in.*field, [&](const F& v) {
        oracle::PolarGateLoopInputs moved = in;
        moved.*field = v;
        return loss(moved);
      });
    };
    const auto g = oracle::polar_gate_loop_backward(kDims, reverse, in, dy, dfinal);
    expect_near(g.dq, by(&oracle::PolarGateLoopInputs::q), kDifferences, "dq");
    expect_near(g.dk, by(&oracle::PolarGateLoopInputs::k), kDifferences, "dk");
    expect_near(g.dv, by(&oracle::PolarGateLoopInputs::v), kDifferences, "dv");
    expect_near(g.dz, by(&oracle::PolarGateLoopInputs::z), kDifferences, "dz");
    expect_near(g.dinitial, by(&oracle::PolarGateLoopInputs::initial_state), kDifferences,
                "dinitial");
  }
}

TEST(Oracle, SimpleGateLoopAdjoint) {
  for (const bool reverse : {false, true}) {
    for (const bool normalize : {false, true}) {
      Random random(3);
      const std::size_t n = elements(kDims);
      const oracle::SimpleInputs in{random.normal(n), random.normal(n), random.normal(n),
                                    random.normal(states(kDims))};
      const auto dy = random.normal(n), dfinal = random.normal(states(kDims));
      const auto by = [&](Array<double> oracle::SimpleInputs::*field) {
        return differences(in.*field, [&](const Array<double>& v) {
          oracle::SimpleInputs moved = in;
          moved.*field = v;
          const auto out = oracle::simple_gate_loop(kDims, reverse, normalize, moved);
          return dot(out.y, dy) + dot(out.final_state, dfinal);
        });
      };
      const auto g = oracle::simple_gate_loop_backward(kDims, reverse, normalize, in, dy, dfinal);
      expect_near(g.dq, by(&oracle::SimpleInputs::q), kDifferences, "dq");
      expect_near(g.dkv, by(&oracle::SimpleInputs::kv), kDifferences, "dkv");
      expect_near(g.dz, by(&oracle::SimpleInputs::z), kDifferences, "dz");
      expect_near(g.dinitial, by(&oracle::SimpleInputs::initial_state), kDifferences, "dinitial");
    }
  }
}

// (a2, x2) • (a1, x1) applied to h is the two steps one after the other, however they are grouped.
TEST(Oracle, TheScanOperatorIsAssociative) {
  struct Pair {
    Complex a, x;
  };
  const auto then = [](Pair first, Pair second) {
    return Pair{second.a * first.a, second.a * first.x + second.x};
  };
  Random random(4);
  for (int i = 0; i < 100; ++i) {
    const auto n = random.complex_normal(6);
    const Pair p{n[0], n[1]}, q{n[2], n[3]}, r{n[4], n[5]};
    const Pair left = then(then(p, q), r), right = then(p, then(q, r));
    // Six roundings at 1e-16 of values up to some hundred.
    EXPECT_LT(std::abs(left.a - right.a), 1e-12);
    EXPECT_LT(std::abs(left.x - right.x), 1e-12);
  }
}

// 1 per cent of a channel of 2^-16 is a millionth of one of 1.
TEST(Harness, JudgesEachChannelByItself) {
  const std::vector<double> expected{1, 0x1p-16, -1, 0x1p-16}, scale = scales(expected, 2);
  std::vector<double> actual = expected;
  EXPECT_TRUE(near(actual, expected, scale, {1e-5, 0}));
  actual[3] *= 1.01;
  EXPECT_FALSE(near(actual, expected, scale, {1e-5, 0}));
  actual[3] = NAN;
  EXPECT_FALSE(near(actual, expected, scale, {1e-5, 0}));
}

}  // namespace
}  // namespace gateloop::testing
