#include <cmath>

#include "harness.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

using recurrence::checkpoint_count;
using recurrence::kCheckpointBlock;

struct Case {
  DType dtype;
  Dims dims;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;    // initial and final ones given
  bool gradient = true;  // dy given
  int threads = 1;
  std::uint64_t seed = 11;
};

std::string describe(const Case& c) { return describe(c.dtype, c.dims, c.reverse, c.layout); }

/// Inputs as stored and outputs as read back.
struct Outcome {
  oracle::GateLoopInputs in;
  Array<double> dy, y, dq, dk, dv;
  Array<Complex> dfinal, final_state, dz, dinitial, checkpoints;
};

/// Half the gates with |z| around 1, where the gradient lives, half with |a| in [0.99, 1), and now
/// and then z = 0.
Array<Complex> gates(Random& random, std::size_t n) {
  Array<Complex> z = random.ring(n, 4.6, 8);
  const Array<Complex> near = random.complex_normal(n);
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 2 == 0) z[i] = near[i];
    if (i % 97 == 5) z[i] = 0;
  }
  return z;
}

Outcome run_on(const Case& c, const Array<Complex>& z_values) {
  Random random(c.seed);
  const DType dtype = c.dtype;
  const Dims n = c.dims;
  Tensor q(dtype, n, c.layout), k(dtype, n, c.layout), v(dtype, n, c.layout),
      z(dtype, n, c.layout, 2), y(dtype, n, c.layout), dy(dtype, n, c.layout),
      dq(dtype, n, c.layout), dk(dtype, n, c.layout), dv(dtype, n, c.layout),
      dz(dtype, n, c.layout, 2);
  StateTensor initial(dtype, n, 2), final_state(dtype, n, 2), dfinal(dtype, n, 2),
      dinitial(dtype, n, 2);
  Tensor checkpoints(accumulation(dtype), {n.batch, checkpoint_count(n.time), n.channels},
                     Layout::kContiguous, 2);
  for (Tensor* t : {&q, &k, &v, &dy}) t->set(random.normal(elements(n)));
  z.set(z_values);
  initial.set(random.complex_normal(states(n)));
  dfinal.set(random.complex_normal(states(n)));

  recurrence::GateLoop forward;
  forward.dtype = dtype;
  forward.shape = {n.batch, n.time, n.channels};
  forward.reverse = c.reverse;
  forward.q = q.in();
  forward.k = k.in();
  forward.v = v.in();
  forward.z = z.in();
  forward.y = y.out();
  forward.checkpoints = checkpoints.data();
  if (c.states) {
    forward.initial_state = initial.data();
    forward.final_state = final_state.data();
  }
  execute(forward, c.threads);

  recurrence::GateLoopBackward backward;
  backward.dtype = dtype;
  backward.shape = forward.shape;
  backward.reverse = c.reverse;
  backward.q = q.in();
  backward.k = k.in();
  backward.v = v.in();
  backward.z = z.in();
  if (c.gradient) backward.dy = dy.in();
  backward.checkpoints = checkpoints.data();
  backward.dq = dq.out();
  backward.dk = dk.out();
  backward.dv = dv.out();
  backward.dz = dz.out();
  if (c.states) {
    backward.dfinal_state = dfinal.data();
    backward.dinitial_state = dinitial.data();
  }
  execute(backward, c.threads);

  for (const Tensor* t : {&q, &k, &v, &z, &y, &dy, &dq, &dk, &dv, &dz, &checkpoints}) {
    t->expect_guards_intact("sequence");
  }
  for (const StateTensor* t : {&initial, &final_state, &dfinal, &dinitial}) {
    t->expect_guards_intact("state");
  }
  Outcome out;
  out.in = {q.get(), k.get(), v.get(), z.get_complex(), {}};
  out.y = y.get();
  out.dq = dq.get();
  out.dk = dk.get();
  out.dv = dv.get();
  out.dz = dz.get_complex();
  out.checkpoints = checkpoints.get_complex();
  if (c.gradient) out.dy = dy.get();
  if (c.states) {
    out.in.initial_state = initial.get_complex();
    out.final_state = final_state.get_complex();
    out.dfinal = dfinal.get_complex();
    out.dinitial = dinitial.get_complex();
  }
  return out;
}

Outcome run(const Case& c) {
  Random random(c.seed + 1);
  return run_on(c, gates(random, elements(c.dims)));
}

void check(const Case& c, const Outcome& out) {
  SCOPED_TRACE(describe(c));
  const Tolerance close = tolerance(c.dtype, c.dims.time);
  const Tolerance close_state = tolerance(accumulation(c.dtype), c.dims.time);
  const auto forward = oracle::gate_loop(c.dims, c.reverse, out.in);
  expect_near(out.y, forward.y, close, "y");
  if (c.states) expect_near(out.final_state, forward.final_state, close_state, "final");

  Array<Complex> saved;
  for (std::int64_t b = 0; b < c.dims.batch; ++b) {
    for (std::int64_t s = 0; s < c.dims.time; s += kCheckpointBlock) {
      const std::int64_t t = c.reverse ? c.dims.time - 1 - s : s;
      const auto row = forward.states.begin() + (b * c.dims.time + t) * c.dims.channels;
      saved.insert(saved.end(), row, row + c.dims.channels);
    }
  }
  expect_near(out.checkpoints, saved, close_state, "checkpoints");

  const auto backward = oracle::gate_loop_backward(c.dims, c.reverse, out.in, out.dy, out.dfinal);
  expect_near(out.dq, backward.dq, close, "dq");
  expect_near(out.dk, backward.dk, close, "dk");
  expect_near(out.dv, backward.dv, close, "dv");
  expect_near(out.dz, backward.dz, close, "dz");
  if (c.states) expect_near(out.dinitial, backward.dinitial, close_state, "dinitial");
}
void check(const Case& c) { check(c, run(c)); }

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.y, b.y, what + " y");
  expect_same_bits(a.final_state, b.final_state, what + " final");
  expect_same_bits(a.checkpoints, b.checkpoints, what + " checkpoints");
  expect_same_bits(a.dq, b.dq, what + " dq");
  expect_same_bits(a.dk, b.dk, what + " dk");
  expect_same_bits(a.dv, b.dv, what + " dv");
  expect_same_bits(a.dz, b.dz, what + " dz");
  expect_same_bits(a.dinitial, b.dinitial, what + " dinitial");
}

TEST(GateLoop, MatchesTheOracle) {
  for (const DType dtype : kRealDTypes) {
    for (const Dims& dims : covering_shapes()) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype, .dims = dims, .reverse = reverse});
      }
    }
  }
}

TEST(GateLoop, AnyLayout) {
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

TEST(GateLoop, EveryTarget) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    ASSERT_EQ(recurrence::cpu::active_target(), target);
    for (const DType dtype : kRealDTypes) check({.dtype = dtype, .dims = {2, 66, 47}});
  }
  recurrence::cpu::force_target("");
}

// (1, 9000, 5) is parallel in time, (2, 130, 600) in channels, (7, 66, 333) in the batch.
TEST(GateLoop, SameBitsForAnyThreads) {
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
TEST(GateLoop, SameBitsPipelined) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (const bool reverse : {false, true}) {
      Case c{.dtype = dtype, .dims = {1, 1600, 600}};
      c.reverse = reverse;
      const Outcome one = run(c);
      c.threads = reverse ? 3 : 2;
      expect_same(one, run(c), describe(c));
    }
  }
}

TEST(GateLoop, ParallelInTime) {
  for (const DType dtype : kRealDTypes) {
    for (const bool reverse : {false, true}) {
      check({.dtype = dtype, .dims = {1, 4096, 3}, .reverse = reverse, .threads = 2});
      check({.dtype = dtype, .dims = {2, 5003, 1}, .reverse = reverse, .threads = 3});
    }
  }
  check({.dtype = DType::kFloat32, .dims = {1, 70001, 2}, .threads = 2});
}

// Stores past the cache, where rows are aligned (128 channels) and where they are not.
TEST(GateLoop, SameBitsPastTheCache) {
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

// No checkpoints wanted: the same y, and nothing written elsewhere.
TEST(GateLoop, CheckpointsAreOptional) {
  const Case c{.dtype = DType::kFloat32, .dims = {2, 130, 19}, .states = false};
  const Outcome with = run(c);
  Tensor q(c.dtype, c.dims), k(c.dtype, c.dims), v(c.dtype, c.dims), y(c.dtype, c.dims),
      z(c.dtype, c.dims, Layout::kContiguous, 2);
  q.set(with.in.q);
  k.set(with.in.k);
  v.set(with.in.v);
  z.set(with.in.z);
  execute(recurrence::GateLoop{c.dtype,
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
TEST(GateLoop, HugeAndTinyGates) {
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
      const auto forward = oracle::gate_loop(c.dims, false, out.in);
      expect_near(out.y, forward.y, tolerance(dtype, 3), target + " y");
      const auto g = oracle::gate_loop_backward(c.dims, false, out.in, out.dy, out.dfinal);
      // dz grows as 1/|z|; dz |z| is of one size over all magnitudes. The kernel holds e^-r at
      // e^-87 (e^-708 in float64), so some 1e-38 of the radial part never fades: allowed as
      // absolute error.
      Array<Complex> actual = out.dz, expected = g.dz;
      double scale = 0;
      for (std::size_t i = 0; i < z.size(); ++i) {
        actual[i] *= std::abs(out.in.z[i]);
        expected[i] *= std::abs(out.in.z[i]);
        scale = std::max(scale, std::abs(expected[i]));
      }
      const double held = dtype == DType::kFloat64 ? 3e-307 : 1e-37;
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

TEST(GateLoop, NanStaysInItsChannel) {
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

TEST(GateLoop, RejectsComplexStorage) {
  recurrence::GateLoop p;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  recurrence::GateLoopBackward backward;
  backward.dtype = DType::kComplex128;
  EXPECT_THROW(recurrence::run(backward, {}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::testing
