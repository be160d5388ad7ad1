#pragma once

/// polar_gate_loop and its adjoint on drawn inputs, and the judgement of the outcome by the oracle.
#include "harness.h"

namespace gateloop::testing::polar {

struct Case {
  DType dtype;
  Dims dims;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;       // initial and final ones given
  bool gradient = true;     // dy given
  std::int64_t sound = -1;  // steps of an input, and of a gradient, that is zero otherwise
  int threads = 1;
  std::uint64_t seed = 11;
};

/// Inputs as stored and outputs as read back.
struct Outcome {
  oracle::PolarGateLoopInputs in;
  Array<double> dy, y, dq, dk, dv;
  Array<Complex> dfinal, final_state, dz, dinitial, saved_states;
};

std::string describe(const Case&);
/// Half the gates have |z| around 1, where the gradient is large, half |a| in [0.99, 1). Now and
/// then z = 0.
Array<Complex> gates(Random& random, std::size_t n);
/// Draws everything but z from the seed and runs the kernels.
Outcome run_on(const Case&, const Array<Complex>& z);
Outcome run(const Case&);

void check(const Case&, const Outcome&);
void check(const Case&);
void expect_same(const Outcome& a, const Outcome& b, const std::string& what);

}  // namespace gateloop::testing::polar
