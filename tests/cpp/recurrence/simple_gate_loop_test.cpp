#include <cmath>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/subnormals.h"
#include "recurrence/cpu/target.h"
#include "simple_gate_loop_case.h"

namespace gateloop::testing::simple {
namespace {

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
    expect_same_pipelined(Case{.dtype = dtype, .dims = {1, 1600, 600}, .normalize = true});
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

// Saturated gates keep all of the state or none; their gradients fade without a NaN.
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
        // Gates below e^-87 (e^-708 in float64) are held there, and g is at most 5.
        check(c, run_on(c, z), dtype == DType::kFloat64 ? 1.6e-307 : 8e-38);
      }
    }
  }
  recurrence::cpu::force_target("");
}

// The state of a sound of 8 steps falls below the normal numbers, and back again the gradient.
TEST(SimpleGateLoop, DecaysToSilence) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const Case c{.dtype = dtype, .dims = {1, 300, 37}, .sound = 8, .threads = 2};
    const Array<double> z(elements(c.dims), 0);
    const Outcome out = run_on(c, z);
    check(c, out);
    for (const auto* values : {&out.y, &out.final_state, &out.saved_states, &out.dq, &out.dz}) {
      expect_no_subnormals(*values);
    }
    const recurrence::cpu::FlushSubnormals mode_of_caller;
    expect_same(out, run_on(c, z), "where the caller flushes too");
  }
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
}  // namespace gateloop::testing::simple
