#pragma once

/// simple_gate_loop and its adjoint on drawn inputs, and the judgement of the outcome by the
/// oracle.
#include "harness.h"

namespace gateloop::testing::simple {

struct Case {
  DType dtype;
  Dims dims;
  bool normalize = false;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;       // initial and final ones given
  bool gradient = true;     // dy given
  std::int64_t sound = -1;  // steps of an input, and of a gradient, that is zero otherwise
  int threads = 1;
  std::uint64_t seed = 13;
};

/// Inputs as stored and outputs as read back.
struct Outcome {
  oracle::SimpleInputs in;
  Array<double> dy, dfinal, y, final_state, saved_states, dq, dkv, dz, dinitial;
};

std::string describe(const Case&);
/// Half the gates around 0.5, where the gradient is large, half in [0.99, 1).
Array<double> gates(Random& random, std::size_t n);
/// Draws everything but z from the seed and runs the kernels.
Outcome run_on(const Case&, const Array<double>& z);
Outcome run(const Case&);

/// `held`: how much of a gate that should be smaller the kernel keeps.
void check(const Case&, const Outcome&, double held = 0);
void check(const Case&);
void expect_same(const Outcome& a, const Outcome& b, const std::string& what);

}  // namespace gateloop::testing::simple
