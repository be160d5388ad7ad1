#include <cmath>

#include "polar_gate_loop_case.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/subnormals.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing::polar {
namespace {

TEST(PolarGateLoop, MatchesTheOracle) {
  for (const DType dtype : kRealDTypes) {
    for (const Dims& dims : covering_shapes()) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype, .dims = dims, .reverse = reverse});
      }
    }
  }
}

TEST(PolarGateLoop, AnyLayout) {
  for (const DType dtype : kRealDTypes) {
    for (const Layout layout : kLayouts) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype, .dims = {3, 67, 37}, .reverse = reverse, .layout = layout});
      }
    }
    check({.dtype = dtype, .dims = {2, 67, 37}, .states = false});
    check({.dtype = dtype, .dims = {2, 67, 37}, .gradient = false});
  }
}

TEST(PolarGateLoop, EveryTarget) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    ASSERT_EQ(recurrence::cpu::active_target(), target);
    for (const DType dtype : kRealDTypes) check({.dtype = dtype, .dims = {2, 66, 47}});
  }
  recurrence::cpu::force_target("");
}

// (1, 9000, 5) is parallel in time, (2, 130, 600) in channels, (7, 66, 333) in the batch.
TEST(PolarGateLoop, SameBitsForAnyThreads) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (const Dims dims : {Dims{1, 9000, 5}, Dims{2, 130, 600}, Dims{7, 66, 333}}) {
      Case c{.dtype = dtype, .dims = dims};
      const Outcome one = run(c);
      for (const int threads : {1, 2, 3, 5, 16}) {
        c.threads = threads;
        expect_same(one, run(c), describe(c) + " threads " + std::to_string(threads));
      }
    }
  }
}

// Tiles of one row pass from thread to thread, block by block.
TEST(PolarGateLoop, SameBitsPipelined) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    expect_same_pipelined(Case{.dtype = dtype, .dims = {1, 1600, 600}});
  }
}

TEST(PolarGateLoop, ParallelInTime) {
  for (const DType dtype : kRealDTypes) {
    for (const bool reverse : {false, true}) {
      check({.dtype = dtype, .dims = {1, 4096, 3}, .reverse = reverse, .threads = 2});
      check({.dtype = dtype, .dims = {2, 5003, 1}, .reverse = reverse, .threads = 3});
    }
  }
  check({.dtype = DType::kFloat32, .dims = {1, 70001, 2}, .threads = 2});
}

// Stores past the cache, where rows are aligned (128 channels) and where they are not.
TEST(PolarGateLoop, SameBitsPastTheCache) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kRealDTypes) {
      for (const Dims dims : {Dims{2, 67, 128}, Dims{1, 5, 21}}) {
        for (const Layout layout : kLayouts) {
          const Case c{.dtype = dtype, .dims = dims, .layout = layout, .threads = 2};
          const Outcome cached = run(c);
          recurrence::cpu::set_stream_bytes(0);
          expect_same(cached, run(c), target + " " + describe(c));
          recurrence::cpu::set_stream_bytes(recurrence::cpu::kStreamBytes);
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

// No saved states wanted: the same y, and nothing written elsewhere.
TEST(PolarGateLoop, SavedStatesAreOptional) {
  const Case c{.dtype = DType::kFloat32, .dims = {2, 130, 19}, .states = false};
  const Outcome with = run(c);
  Tensor q(c.dtype, c.dims), k(c.dtype, c.dims), v(c.dtype, c.dims), y(c.dtype, c.dims),
      z(c.dtype, c.dims, Layout::kContiguous, 2);
  q.set(with.in.q);
  k.set(with.in.k);
  v.set(with.in.v);
  z.set(with.in.z);
  execute(recurrence::PolarGateLoop{c.dtype,
                                    {2, 130, 19},
                                    false,
                                    q.in(),
                                    k.in(),
                                    v.in(),
                                    z.in(),
                                    nullptr,
                                    y.out(),
                                    nullptr,
                                    nullptr},
          1);
  expect_same_bits(y.get(), with.y, "y");
}

// |z|² overflows or is subnormal in float32; the gate must not.
TEST(PolarGateLoop, HugeAndTinyGates) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      const Case c{.dtype = dtype, .dims = {1, 3, 40}};
      Random random(5);
      Array<Complex> z = random.ring(elements(c.dims), 1, 2);
      // 1/|z| of a subnormal overflows, and dz with it: the smallest here is normal.
      const double top = dtype == DType::kFloat64 ? 1e307 : 5e37;
      const double magnitudes[] = {0,  2 / top, 1e-30, 1e-20, 1e-10, 1,
                                   20, 90,      1e10,  1e20,  1e30,  top};
      for (std::size_t i = 0; i < z.size(); ++i) {
        z[i] *= magnitudes[i % std::size(magnitudes)];
        if (i % 5 == 1) z[i] = Complex(-std::abs(z[i]), 0);
        if (i % 5 == 2) z[i] = Complex(0, std::abs(z[i]));
      }
      const Outcome out = run_on(c, z);
      const auto forward = oracle::polar_gate_loop(c.dims, false, out.in);
      const auto size =
          oracle::polar_gate_loop_magnitudes(c.dims, false, out.in, out.dy, out.dfinal);
      expect_near(out.y, forward.y, scales(size.y, c.dims.channels), tolerance(dtype, 3),
                  target + " y");
      const auto g = oracle::polar_gate_loop_backward(c.dims, false, out.in, out.dy, out.dfinal);
      // dz grows as 1/|z|; dz |z| is of one size over all magnitudes. The kernel holds e^-r at
      // e^-87 (e^-708 in float64), so 1.6e-38 of a radial part of 10 never fades: allowed as
      // absolute error.
      Array<Complex> actual = out.dz, expected = g.dz;
      double scale = 0;
      for (std::size_t i = 0; i < z.size(); ++i) {
        actual[i] *= std::abs(out.in.z[i]);
        expected[i] *= std::abs(out.in.z[i]);
        scale = std::max(scale, std::abs(expected[i]));
      }
      const double held = dtype == DType::kFloat64 ? 3e-307 : 1.6e-37;
      const Tolerance close = tolerance(dtype, 3);
      for (std::size_t i = 0; i < z.size(); ++i) {
        EXPECT_LE(std::abs(actual[i] - expected[i]),
                  close.scaled * scale + 2 * close.relative * std::abs(expected[i]) +
                      held * std::abs(out.in.z[i]))
            << target << " " << name(dtype) << " z " << out.in.z[i] << " dz " << out.dz[i]
            << " should be " << g.dz[i];
      }
    }
  }
  recurrence::cpu::force_target("");
}

// The state of a sound of 8 steps falls below the normal numbers.
TEST(PolarGateLoop, DecaysToSilence) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Case c{.dtype = dtype, .dims = {1, 300, 37}, .sound = 8, .threads = 2};
    Random random(9);
    const Array<Complex> z = random.ring(elements(c.dims), 0.01, 0.1);
    const Outcome out = run_on(c, z);
    check(c, out);
    for (const auto* values : {&out.y, &out.dq}) expect_no_subnormals(*values);
    for (const auto* values : {&out.final_state, &out.saved_states, &out.dz}) {
      expect_no_subnormals(flatten(*values));
    }
    const recurrence::cpu::FlushSubnormals mode_of_caller;
    expect_same(out, run_on(c, z), "where the caller flushes too");
  }
}

// |a| is 0.5 and its direction that of z, however small z is.
TEST(PolarGateLoop, SubnormalGatesKeepTheirDirection) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      const Case c{.dtype = dtype, .dims = {1, 3, 37}};
      Random random(10);
      Array<Complex> z = random.ring(elements(c.dims), 0.5e-39, 8e-39);
      // The oracle too computes in float64: its |z| is exact of these.
      if (dtype == DType::kFloat64) std::ranges::fill(z, Complex(3, -4) * 0x1p-1060);
      const Outcome out = run_on(c, z);
      const auto expected = oracle::polar_gate_loop(c.dims, false, out.in);
      const auto size_of =
          oracle::polar_gate_loop_magnitudes(c.dims, false, out.in, out.dy, out.dfinal);
      SCOPED_TRACE(target + " " + describe(c));
      expect_near(out.y, expected.y, scales(size_of.y, c.dims.channels), tolerance(dtype, 3), "y");
      expect_near(out.final_state, expected.final_state, scales(size_of.states, c.dims.channels),
                  tolerance(accumulation(dtype), 3), "final");
    }
  }
  recurrence::cpu::force_target("");
}

TEST(PolarGateLoop, NanStaysInItsChannel) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kRealDTypes) {
      const Case c{.dtype = dtype, .dims = {1, 70, 37}};
      Random random(6);
      Array<Complex> z = gates(random, elements(c.dims));
      z[10 * 37 + 4] = Complex(NAN, 1);
      z[20 * 37 + 36] = Complex(1, NAN);
      const Outcome out = run_on(c, z);
      for (std::int64_t t = 0; t < 70; ++t) {
        for (std::int64_t ch = 0; ch < 37; ++ch) {
          const auto i = static_cast<std::size_t>(t * 37 + ch);
          const bool after = (ch == 4 && t >= 10) || (ch == 36 && t >= 20);
          EXPECT_EQ(std::isnan(out.y[i]), after) << name(dtype) << " t " << t << " channel " << ch;
        }
      }
      EXPECT_TRUE(std::isnan(out.dz[10 * 37 + 4].real()));
      EXPECT_TRUE(std::isnan(out.dz[20 * 37 + 36].real()));
    }
  }
  recurrence::cpu::force_target("");
}

TEST(PolarGateLoop, RejectsComplexStorage) {
  recurrence::PolarGateLoop p;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  recurrence::PolarGateLoopBackward backward;
  backward.dtype = DType::kComplex128;
  EXPECT_THROW(recurrence::run(backward, {}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::testing::polar
