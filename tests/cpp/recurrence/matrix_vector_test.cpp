#include <cmath>
#include <utility>

#include "harness.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

struct Outcome {
  std::vector<double> y, expected, magnitude;  // magnitude: Σ |w x| + |b|
};

Outcome product(DType dtype, std::int64_t rows, std::int64_t columns, bool with_bias,
                int thread_count) {
  Random random(17);
  Tensor matrix(dtype, {1, rows, columns}), x(accumulation(dtype), {1, 1, columns}),
      bias(dtype, {1, 1, rows}), y(dtype, {1, 1, rows});
  matrix.set(random.normal(elements({1, rows, columns})));
  x.set(random.normal(elements({1, 1, columns})));
  bias.set(random.normal(elements({1, 1, rows})));

  recurrence::MatrixVector p;
  p.dtype = dtype;
  p.rows = rows;
  p.columns = columns;
  p.matrix = matrix.data();
  p.x = x.data();
  p.bias = with_bias ? bias.data() : nullptr;
  p.y = y.data();
  execute(p, thread_count);
  y.expect_guards_intact("y");

  Outcome out{y.get(), {}, {}};
  const auto w = matrix.get(), in = x.get(), b = bias.get();
  for (std::int64_t r = 0; r < rows; ++r) {
    double sum = with_bias ? b[r] : 0, magnitude = std::abs(sum);
    for (std::int64_t c = 0; c < columns; ++c) {
      const double term = w[r * columns + c] * in[c];
      sum += term, magnitude += std::abs(term);
    }
    out.expected.push_back(sum);
    out.magnitude.push_back(magnitude);
  }
  return out;
}

/// Around vectors of 1 to 64 lanes, and more than one run of rows.
constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {1, 1}, {3, 0}, {0, 5}, {5, 7}, {2, 63}, {3, 64}, {4, 65}, {7, 257}, {300, 129}};

TEST(MatrixVector, EqualsTheDefinition) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kRealDTypes) {
      for (const auto& [rows, columns] : kShapes) {
        for (const bool with_bias : {false, true}) {
          const auto out = product(dtype, rows, columns, with_bias, 2);
          for (std::size_t r = 0; r < out.y.size(); ++r) {
            // One rounding of y; 2 + columns / 4 roundings of partial sums at the most.
            const double sums = half_ulp(accumulation(dtype)) *
                                static_cast<double>(2 + columns / 4) * out.magnitude[r];
            EXPECT_NEAR(out.y[r], out.expected[r],
                        half_ulp(dtype) * std::abs(out.expected[r]) + sums)
                << target << " " << name(dtype) << " " << rows << "x" << columns << " row " << r;
          }
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(MatrixVector, IsTheSameForAnyNumberOfThreads) {
  for (const DType dtype : kRealDTypes) {
    const auto one = product(dtype, 300, 257, true, 1), three = product(dtype, 300, 257, true, 3);
    expect_same_bits(one.y, three.y, name(dtype));
  }
}

TEST(MatrixVector, RefusesComplexNumbersAndNegativeSizes) {
  expect_refusals<recurrence::MatrixVector>();
}

}  // namespace
}  // namespace gateloop::testing
