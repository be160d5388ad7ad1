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
  bool normalize = false;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;    // initial and final ones given
  bool gradient = true;  // dy given
  int threads = 1;
  std::uint64_t seed = 13;
};

std::string describe(const Case& c) {
  return describe(c.dtype, c.dims, c.reverse, c.layout) + (c.normalize ? " normalized" : "");
}

/// Inputs as stored and outputs as read back.
struct Outcome {
  oracle::SimpleInputs in;
  Array<double> dy, dfinal, y, final_state, checkpoints, dq, dkv, dz, dinitial;
};

/// Half the gates around 0.5, where the gradient lives, half in [0.99, 1).
Array<double> gates(Random& random, std::size_t n) {
  Array<double> z = random.uniform(n, 4.6, 8);
  const Array<double> near = random.normal(n);
  for (std::size_t i = 0; i < n; i += 2) z[i] = near[i];
  return z;
}

Outcome run_on(const Case& c, const Array<double>& z_values) {
  Random random(c.seed);
  const DType dtype = c.dtype;
  const Dims n = c.dims;
  Tensor q(dtype, n, c.layout), kv(dtype, n, c.layout), z(dtype, n, c.layout),
      y(dtype, n, c.layout), dy(dtype, n, c.layout), dq(dtype, n, c.layout),
      dkv(dtype, n, c.layout), dz(dtype, n, c.layout);
  StateTensor initial(dtype, n), final_state(dtype, n), dfinal(dtype, n), dinitial(dtype, n);
  Tensor checkpoints(accumulation(dtype), {n.batch, checkpoint_count(n.time), n.channels});
  for (Tensor* t : {&q, &kv, &dy}) t->set(random.normal(elements(n)));
  z.set(z_values);
  initial.set(random.normal(states(n)));
  dfinal.set(random.normal(states(n)));

  recurrence::SimpleGateLoop forward;
  forward.dtype = dtype;
  forward.shape = {n.batch, n.time, n.channels};
  forward.reverse = c.reverse;
  forward.normalize_input = c.normalize;
  forward.q = q.in();
  forward.kv = kv.in();
  forward.z = z.in();
  forward.y = y.out();
  forward.checkpoints = checkpoints.data();
  if (c.states) {
    forward.initial_state = initial.data();
    forward.final_state = final_state.data();
  }
  execute(forward, c.threads);

  recurrence::SimpleGateLoopBackward backward;
  backward.dtype = dtype;
  backward.shape = forward.shape;
  backward.reverse = c.reverse;
  backward.normalize_input = c.normalize;
  backward.q = q.in();
  backward.kv = kv.in();
  backward.z = z.in();
  if (c.gradient) backward.dy = dy.in();
  backward.checkpoints = checkpoints.data();
  backward.dq = dq.out();
  backward.dkv = dkv.out();
  backward.dz = dz.out();
  if (c.states) {
    backward.dfinal_state = dfinal.data();
    backward.dinitial_state = dinitial.data();
  }
  execute(backward, c.threads);

  for (const Tensor* t : {&q, &kv, &z, &y, &dy, &dq, &dkv, &dz, &checkpoints}) {
    t->expect_guards_intact("sequence");
  }
  for (const StateTensor* t : {&initial, &final_state, &dfinal, &dinitial}) {
    t->expect_guards_intact("state");
  }
  Outcome out;
  out.in = {q.get(), kv.get(), z.get(), {}};
  out.y = y.get();
  out.dq = dq.get();
  out.dkv = dkv.get();
  out.dz = dz.get();
  out.checkpoints = checkpoints.get();
  if (c.gradient) out.dy = dy.get();
  if (c.states) {
    out.in.initial_state = initial.get();
    out.final_state = final_state.get();
    out.dfinal = dfinal.get();
    out.dinitial = dinitial.get();
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
  const auto forward = oracle::simple_gate_loop(c.dims, c.reverse, c.normalize, out.in);
  expect_near(out.y, forward.y, close, "y");
  if (c.states) expect_near(out.final_state, forward.final_state, close_state, "final");

  Array<double> saved;
  for (std::int64_t b = 0; b < c.dims.batch; ++b) {
    for (std::int64_t s = 0; s < c.dims.time; s += kCheckpointBlock) {
      const std::int64_t t = c.reverse ? c.dims.time - 1 - s : s;
      const auto row = forward.states.begin() + (b * c.dims.time + t) * c.dims.channels;
      saved.insert(saved.end(), row, row + c.dims.channels);
    }
  }
  expect_near(out.checkpoints, saved, close_state, "checkpoints");

  const auto backward =
      oracle::simple_gate_loop_backward(c.dims, c.reverse, c.normalize, out.in, out.dy, out.dfinal);
  expect_near(out.dq, backward.dq, close, "dq");
  expect_near(out.dkv, backward.dkv, close, "dkv");
  expect_near(out.dz, backward.dz, close, "dz");
  if (c.states) expect_near(out.dinitial, backward.dinitial, close_state, "dinitial");
}
void check(const Case& c) { check(c, run(c)); }

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.y, b.y, what + " y");
  expect_same_bits(a.final_state, b.final_state, what + " final");
  expect_same_bits(a.checkpoints, b.checkpoints, what + " checkpoints");
  expect_same_bits(a.dq, b.dq, what + " dq");
  expect_same_bits(a.dkv, b.dkv, what + " dkv");
  expect_same_bits(a.dz, b.dz, what + " dz");
  expect_same_bits(a.dinitial, b.dinitial, what + " dinitial");
}

TEST(SimpleGateLoop, MatchesTheOracle) {
  for (const DType dtype : kRealDTypes) {
    for (const Dims& dims : covering_shapes()) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype,
               .dims = dims,
               .normalize = dims.channels % 2 == 1,
               .reverse = reverse});
      }
    }
  }
}

TEST(SimpleGateLoop, AnyLayout) {
  for (const DType dtype : kRealDTypes) {
    for (const bool normalize : {false, true}) {
      for (const Layout layout : kLayouts) {
        for (const bool reverse : {false, true}) {
          check({.dtype = dtype,
                 .dims = {3, 67, 37},
                 .normalize = normalize,
                 .reverse = reverse,
                 .layout = layout});
        }
      }
      check({.dtype = dtype, .dims = {2, 67, 37}, .normalize = normalize, .states = false});
      check({.dtype = dtype, .dims = {2, 67, 37}, .normalize = normalize, .gradient = false});
    }
  }
}

TEST(SimpleGateLoop, EveryTarget) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    ASSERT_EQ(recurrence::cpu::active_target(), target);
    for (const DType dtype : kRealDTypes) {
      for (const bool normalize : {false, true}) {
        check({.dtype = dtype, .dims = {2, 66, 47}, .normalize = normalize});
      }
    }
  }
  recurrence::cpu::force_target("");
}

// (1, 9000, 5) is parallel in time, (2, 130, 600) in channels, (7, 66, 333) in the batch.
TEST(SimpleGateLoop, SameBitsForAnyThreads) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (const Dims dims : {Dims{1, 9000, 5}, Dims{2, 130, 600}, Dims{7, 66, 333}}) {
      Case c{.dtype = dtype, .dims = dims, .normalize = true};
      const Outcome one = run(c);
      for (const int threads : {1, 2, 3, 5, 16}) {
        c.threads = threads;
        expect_same(one, run(c), describe(c) + " threads " + std::to_string(threads));
      }
    }
  }
}

// Tiles of one row pass from thread to thread, block by block.
TEST(SimpleGateLoop, SameBitsPipelined) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (const bool reverse : {false, true}) {
      Case c{.dtype = dtype, .dims = {1, 1600, 600}, .normalize = true};
      c.reverse = reverse;
      const Outcome one = run(c);
      c.threads = reverse ? 3 : 2;
      expect_same(one, run(c), describe(c));
    }
  }
}

TEST(SimpleGateLoop, ParallelInTime) {
  for (const DType dtype : kRealDTypes) {
    for (const bool reverse : {false, true}) {
      check({.dtype = dtype,
             .dims = {1, 4096, 3},
             .normalize = reverse,
             .reverse = reverse,
             .threads = 2});
      check({.dtype = dtype,
             .dims = {2, 5003, 1},
             .normalize = !reverse,
             .reverse = reverse,
             .threads = 3});
    }
  }
  check({.dtype = DType::kFloat32, .dims = {1, 70001, 2}, .threads = 2});
}

// Stores past the cache, where rows are aligned (128 channels) and where they are not.
TEST(SimpleGateLoop, SameBitsPastTheCache) {
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

// Saturated gates forget everything or nothing; their gradients fade without a NaN.
TEST(SimpleGateLoop, HugeAndTinyGates) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      for (const bool normalize : {false, true}) {
        const Case c{.dtype = dtype, .dims = {1, 5, 48}, .normalize = normalize};
        const double magnitudes[] = {0, 1e-38, 1e-10, 1, 20, 90, 800, 1e10, 1e38};
        Array<double> z(elements(c.dims));
        for (std::size_t i = 0; i < z.size(); ++i) {
          z[i] = (i % 2 ? -1 : 1) * magnitudes[i % std::size(magnitudes)];
        }
        check(c, run_on(c, z));
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(SimpleGateLoop, NanStaysInItsChannel) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kRealDTypes) {
      const Case c{.dtype = dtype, .dims = {1, 70, 37}};
      Random random(6);
      Array<double> z = gates(random, elements(c.dims));
      z[10 * 37 + 4] = NAN;
      z[20 * 37 + 36] = NAN;
      const Outcome out = run_on(c, z);
      for (std::int64_t t = 0; t < 70; ++t) {
        for (std::int64_t ch = 0; ch < 37; ++ch) {
          const auto i = static_cast<std::size_t>(t * 37 + ch);
          const bool after = (ch == 4 && t >= 10) || (ch == 36 && t >= 20);
          EXPECT_EQ(std::isnan(out.y[i]), after) << name(dtype) << " t " << t << " channel " << ch;
        }
      }
      EXPECT_TRUE(std::isnan(out.dz[10 * 37 + 4]));
      EXPECT_TRUE(std::isnan(out.dz[20 * 37 + 36]));
    }
  }
  recurrence::cpu::force_target("");
}

TEST(SimpleGateLoop, RejectsComplexStorage) {
  recurrence::SimpleGateLoop p;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  recurrence::SimpleGateLoopBackward backward;
  backward.dtype = DType::kComplex128;
  EXPECT_THROW(recurrence::run(backward, {}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::testing
