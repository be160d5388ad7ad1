#include <algorithm>

#include "gate_loop_case.h"
#include "recurrence/cpu/subnormals.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing::gate_loop {
namespace {

/// Lengths around the chunk, its groups and primes; widths around the groups; empty sizes.
std::vector<HeadDims> shapes() {
  std::vector<HeadDims> all = {{0, 5, 2, 3, 4},
                               {2, 0, 2, 3, 4},
                               {2, 5, 0, 3, 4},
                               {1, 5, 2, 0, 4},
                               {1, 5, 2, 3, 0},
                               {1, 1, 1, 1, 1},
                               {2, 1, 3, 5, 2},
                               {1, 15, 1, 16, 16},
                               {1, 16, 2, 17, 15},
                               {2, 17, 1, 3, 33},
                               {1, 63, 2, 8, 8},
                               {1, 64, 1, 16, 3},
                               {2, 65, 2, 7, 20},
                               {1, 127, 1, 1, 40},
                               {1, 129, 3, 5, 1},
                               {1, 200, 1, 64, 64},
                               // In chunks whatever the transitions.
                               {2, 65, 2, 66, 65},
                               // Vectors of whole heads, the last one in part.
                               {2, 65, 9, 4, 4},
                               {1, 130, 21, 2, 2},
                               {3, 64, 5, 8, 8},
                               {2, 1, 16, 2, 2}};
  if (!kSanitized)
    all.insert(all.end(), {{1, 521, 2, 32, 48}, {2, 260, 1, 70, 66}, {1, 1031, 1, 4, 4}});
  return all;
}

TEST(GateLoop, MatchesTheOracle) {
  for (const DType dtype : kRealDTypes) {
    for (const HeadDims& dims : shapes()) {
      for (const bool complex : {false, true}) {
        for (const bool per_key : {false, true}) {
          check({.dtype = dtype, .dims = dims, .complex = complex, .per_key = per_key});
        }
        check({.dtype = dtype, .dims = dims, .complex = complex, .reverse = true});
      }
    }
  }
}

TEST(GateLoop, TaylorFeaturesMatchTheOracle) {
  for (const DType dtype : kRealDTypes) {
    for (HeadDims dims : shapes()) {
      dims.keys = std::min<std::int64_t>(dims.keys, 9);  // 55 features
      dims.values = std::min<std::int64_t>(dims.values, 20);
      for (const bool complex : {false, true}) {
        check({.dtype = dtype,
               .dims = dims,
               .complex = complex,
               .feature_map = recurrence::FeatureMap::kTaylor,
               .reverse = complex,
               .layout = complex ? Layout::kContiguous : kLayouts[1],
               .threads = 2});
      }
    }
  }
}

TEST(GateLoop, AnyLayout) {
  for (const DType dtype : kRealDTypes) {
    for (const Layout layout : kLayouts) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype,
               .dims = {3, 67, 2, 5, 9},
               .per_key = reverse,
               .reverse = reverse,
               .layout = layout});
        check({.dtype = dtype,
               .dims = {2, 67, 2, 30, 40},
               .per_key = reverse,
               .reverse = reverse,
               .layout = layout});
      }
    }
    for (const HeadDims& dims :
         {HeadDims{2, 67, 2, 9, 5}, HeadDims{2, 67, 5, 4, 4}, HeadDims{2, 67, 2, 30, 40}}) {
      check({.dtype = dtype, .dims = dims, .states = false});
      check({.dtype = dtype, .dims = dims, .gradient = false});
    }
    for (const std::int64_t width : {2, 4, 8}) {
      for (const Layout layout : kLayouts) {
        const bool reverse = layout == kLayouts[0];
        check({.dtype = dtype,
               .dims = {2, 67, 11, width, width},
               .per_key = reverse,
               .reverse = reverse,
               .layout = layout});
      }
    }
  }
}

TEST(GateLoop, EveryTarget) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    ASSERT_EQ(recurrence::cpu::active_target(), target);
    for (const DType dtype : kRealDTypes) {
      for (const bool complex : {false, true}) {
        for (const bool per_key : {false, true}) {
          for (const HeadDims& dims : {HeadDims{2, 66, 2, 33, 20}, HeadDims{1, 66, 2, 66, 65}}) {
            check({.dtype = dtype, .dims = dims, .complex = complex, .per_key = per_key});
          }
        }
        for (const std::int64_t width : {2, 4, 8}) {
          for (const bool per_key : {false, true}) {
            check({.dtype = dtype,
                   .dims = {2, 66, 11, width, width},
                   .complex = complex,
                   .per_key = per_key});
          }
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

// In chunks one head is parallel in time, several are parallel among themselves.
TEST(GateLoop, SameBitsForAnyThreads) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (const HeadDims dims :
         {HeadDims{1, 300, 1, 34, 33}, HeadDims{2, 130, 3, 34, 33}, HeadDims{1, 200, 2, 40, 33},
          HeadDims{1, 300, 3, 16, 24}, HeadDims{2, 200, 37, 4, 4}, HeadDims{1, 3000, 3, 2, 2}}) {
      for (const bool reverse : {false, true}) {
        Case c{.dtype = dtype, .dims = dims, .per_key = reverse, .reverse = reverse};
        const Outcome one = run(c);
        for (const int threads : {1, 2, 3, 5, 16}) {
          c.threads = threads;
          expect_same(one, run(c), describe(c) + " threads " + std::to_string(threads));
        }
      }
    }
  }
}

// Nothing is divided by a transition.
TEST(GateLoop, ZeroTransitions) {
  for (const bool complex : {false, true}) {
    for (const bool per_key : {false, true}) {
      for (const std::int64_t width : {4, 6, 65}) {
        const Case c{.dims = {1, 150, 3, width, width}, .complex = complex, .per_key = per_key};
        Array<Complex> a(transition_count(c), 0.0);
        check(c, run_on(c, a));
        for (std::size_t i = 0; i < a.size(); i += 2) a[i] = 1;
        check(c, run_on(c, a));
      }
    }
  }
}

// The state of a sound of 8 steps falls below the normal numbers, and back again the gradient.
TEST(GateLoop, DecaysToSilence) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    // Step by step, in vectors of one head and of several; in chunks, one after another and cut.
    for (const HeadDims& dims : {HeadDims{1, 300, 3, 5, 7}, HeadDims{1, 300, 21, 4, 4},
                                 HeadDims{2, 300, 2, 66, 65}, HeadDims{1, 300, 1, 66, 65}}) {
      for (const bool complex : {false, true}) {
        for (const bool per_key : {false, true}) {
          const Case c{.dtype = dtype,
                       .dims = dims,
                       .complex = complex,
                       .per_key = per_key,
                       .reverse = per_key,
                       .sound = 8,
                       .threads = 2};
          Random random(9);
          Array<Complex> a = random.ring(transition_count(c), 0.1, 0.6);
          if (!complex) std::ranges::transform(a, a.begin(), [](Complex x) { return std::abs(x); });
          const Outcome out = run_on(c, a);
          check(c, out);
          for (const auto* values : {&out.y, &out.dq, &out.dk, &out.dv}) {
            expect_no_subnormals(*values);
          }
          for (const auto* values : {&out.final_state, &out.saved_states, &out.da, &out.dinitial}) {
            expect_no_subnormals(flatten(*values));
          }
          const recurrence::cpu::FlushSubnormals mode_of_caller;
          expect_same(out, run_on(c, a), "where the caller flushes too");
        }
      }
    }
  }
}

// Phases of every step add up to more than 10,000 turns; the state never decays.
TEST(GateLoop, LongRotations) {
  for (const HeadDims& dims : {HeadDims{1, kSanitized ? 2000 : 65536, 1, 2, 2},
                               HeadDims{1, kSanitized ? 500 : 20000, 1, 33, 32}}) {
    const Case c{.dims = dims, .gradient = true, .threads = 2};
    Random random(3);
    const Array<Complex> a = random.ring(static_cast<std::size_t>(c.dims.time), 0.999999, 1);
    check(c, run_on(c, a));
  }
}

// No saved states wanted: the same y.
TEST(GateLoop, SavedStatesAreOptional) {
  const HeadDims n{1, 130, 2, 4, 4};
  const Case c{.dims = n, .states = false};
  const Outcome with = run(c);
  Tensor q(c.dtype, {1, 130, 8}), k(c.dtype, {1, 130, 8}), v(c.dtype, {1, 130, 8}),
      y(c.dtype, {1, 130, 8}), a(DType::kComplex64, {1, 130, 2});
  q.set(with.in.q);
  k.set(with.in.k);
  v.set(with.in.v);
  Array<Complex> of_heads;
  for (std::size_t i = 0; i < with.in.a.size(); i += 4) of_heads.push_back(with.in.a[i]);
  a.set(of_heads);
  recurrence::GateLoop p;
  p.shape = {1, 130, 2, 4, 4};
  p.q = {q.data(), 130 * 8, 8, 4};
  p.k = {k.data(), 130 * 8, 8, 4};
  p.v = {v.data(), 130 * 8, 8, 4};
  p.a = {a.data(), 130 * 2, 2, 1};
  p.y = {y.data(), 130 * 8, 8, 4};
  execute(p, 1);
  expect_same_bits(y.get(), with.y, "y");
}

TEST(GateLoop, RefusesWhatItDoesNotTake) {
  recurrence::GateLoop p;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.dtype = DType::kFloat32;
  p.shape.keys = -1;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.shape.keys = 1;
  p.per_key = true;
  p.feature_map = recurrence::FeatureMap::kTaylor;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::testing::gate_loop
