#pragma once

/// The norm of rows and its adjoint on drawn inputs, and the judgement of the outcome by the
/// definition.
#include "harness.h"

namespace gateloop::testing::rms_norm {

struct Case {
  DType dtype;
  std::int64_t rows, columns;
  Layout layout = Layout::kContiguous;  // or kMisaligned
  int threads = 1;
};

struct Outcome {
  std::vector<double> x, gain, dy;   // as stored
  std::vector<double> y, dx, dgain;  // of the kernel
};

std::string describe(const Case&);
Outcome run(const Case&);

void check(const Case&, const Outcome&);
void check(const Case&);
void expect_same(const Outcome& a, const Outcome& b, const std::string& what);

}  // namespace gateloop::testing::rms_norm
