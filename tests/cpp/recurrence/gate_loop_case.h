#pragma once

/// gate_loop of wide heads and its adjoint on drawn inputs, judged by the oracle.
#include "harness.h"

namespace gateloop::testing::gate_loop {

using oracle::HeadDims;

struct Case {
  DType dtype = DType::kFloat32;
  HeadDims dims;
  bool complex = true;
  bool per_key = false;
  recurrence::FeatureMap feature_map = recurrence::FeatureMap::kNone;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;       // initial and final ones given
  bool gradient = true;     // dy given
  std::int64_t sound = -1;  // steps of an input, and of a gradient, that is zero otherwise
  int threads = 1;
  std::uint64_t seed = 11;
};

/// Inputs as stored and outputs as read back; in.q, k and a as the oracle takes them: features, and
/// a transition for each. The rest is as the kernel gives it. q, k: before the feature map.
struct Outcome {
  oracle::GateLoopInputs in;
  Array<double> q, k, dy, y, dq, dk, dv;
  Array<Complex> dfinal, final_state, da, dinitial, saved_states;
};

std::string describe(const Case&);
/// Moduli in [0.99, 1] and in [0, 1], and now and then 0 and 1; negative where they are real.
Array<Complex> transitions(Random& random, std::size_t n, bool complex);
/// a: (B, T, H), or (B, T, H, K) if per key.
Outcome run_on(const Case&, const Array<Complex>& a);
/// How many transitions the case takes.
std::size_t transition_count(const Case&);
Outcome run(const Case&);

void check(const Case&, const Outcome&);
void check(const Case&);
void expect_same(const Outcome& a, const Outcome& b, const std::string& what);

}  // namespace gateloop::testing::gate_loop
