#pragma once

/// linear_recurrence and its adjoint on drawn inputs, and the judgement of the outcome by the
/// oracle.
#include "harness.h"

namespace gateloop::testing::linear {

inline constexpr DType kDTypes[] = {DType::kFloat32,    DType::kFloat64,  DType::kComplex64,
                                    DType::kComplex128, DType::kBFloat16, DType::kFloat16};

struct Case {
  DType dtype;
  Dims dims;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;       // initial and final ones given
  bool broadcast = false;   // one row of `a` for all steps
  std::int64_t sound = -1;  // steps of an input, and of a gradient, that is zero otherwise
  int threads = 1;
  std::uint64_t seed = 7;
};

/// Inputs as stored, outputs as read back; complex numbers throughout, real ones with im = 0.
struct Outcome {
  Array<Complex> a, x, initial, dh, dfinal;
  Array<Complex> h, final_state, da, dx, dinitial;
};

std::string describe(const Case&);
/// Real sequences as complex ones with im = 0, and back.
Array<Complex> get(const Tensor&, DType);
void fill(Tensor&, DType, const Array<Complex>& values);

/// Draws everything but a from the seed and runs the kernels.
Outcome run_on(const Case&, const Array<Complex>& a);
Outcome run(const Case&);

void check(const Case&, const Outcome&);
void check(const Case&);
void expect_same(const Outcome& a, const Outcome& b, const std::string& what);

}  // namespace gateloop::testing::linear
