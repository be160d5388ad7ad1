#include "rms_norm_case.h"

#include <cmath>

namespace gateloop::testing::rms_norm {
namespace {

double floor_of(DType dtype) {
  // As the kernel's type of sums has it.
  return dtype == DType::kFloat16 ? 0x1p-24 : dtype == DType::kFloat64 ? 1e-12 : double{1e-12f};
}

/// One rounding of the value, and those of sums of `terms` numbers and of some steps beside them.
double tolerance(DType dtype, double value, double magnitude, std::int64_t terms) {
  return half_ulp(dtype) * std::abs(value) +
         half_ulp(accumulation(dtype)) * static_cast<double>(8 + terms / 4) * magnitude +
         (dtype == DType::kFloat16 ? 0x1p-25 : 0);  // half of its least number
}

}  // namespace

std::string describe(const Case& c) {
  return describe(c.dtype, {1, c.rows, c.columns}, /*reverse=*/false, c.layout);
}

/// Row 1 is zero; the squares of row 2 are near the end of float32. Row 3 has a norm below the
/// floor, where the types have room, and row 4 exactly the floor.
Outcome run(const Case& c) {
  const auto& [dtype, rows, columns, layout, thread_count] = c;
  Random random(23);
  const Dims matrix{1, rows, columns}, row{1, 1, columns};
  Tensor x(dtype, matrix, layout), gain(dtype, row, layout), dy(dtype, matrix, layout);
  Tensor y(dtype, matrix, layout), dx(dtype, matrix, layout), dgain(dtype, row, layout);
  auto values = random.normal(elements(matrix));
  for (std::int64_t j = 0; j < columns; ++j) {
    if (rows > 1) values[columns + j] = 0;
    if (rows > 2) values[2 * columns + j] *= dtype == DType::kFloat16 ? 1e4 : 1e17;
    if (rows > 3 && dtype != DType::kFloat16) values[3 * columns + j] *= 1e-15;
    if (rows > 4) values[4 * columns + j] = j == 0 ? floor_of(dtype) : 0;
  }
  x.set(values);
  gain.set(random.normal(elements(row)));
  dy.set(random.normal(elements(matrix)));

  const auto of_rows = [&]<class Params>(Params p) {
    p.dtype = c.dtype;
    p.rows = c.rows;
    p.columns = c.columns;
    p.x = x.data();
    p.gain = gain.data();
    return p;
  };
  auto p = of_rows(recurrence::RmsNorm());
  p.y = y.data();
  execute(p, thread_count);
  y.expect_guards_intact("y");

  auto b = of_rows(recurrence::RmsNormBackward());
  b.dy = dy.data();
  b.dx = dx.data();
  b.dgain = dgain.data();
  execute(b, thread_count);
  dx.expect_guards_intact("dx");
  dgain.expect_guards_intact("dgain");
  return {x.get(), gain.get(), dy.get(), y.get(), dx.get(), dgain.get()};
}

void check(const Case& c, const Outcome& n) {
  const DType dtype = c.dtype;
  const std::string what = describe(c);
  const double floor = floor_of(dtype);
  std::vector<double> dgain(c.columns), weight(c.columns);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    double squares = 0, along = 0, magnitude = 0;
    for (std::int64_t j = 0; j < c.columns; ++j) {
      const double x = n.x[r * c.columns + j], g = n.gain[j] * n.dy[r * c.columns + j];
      squares += x * x, along += x * g, magnitude += std::abs(x * g);
    }
    const double norm = std::sqrt(squares);
    const double scale = std::sqrt(static_cast<double>(c.columns)) / std::max(norm, floor);
    for (std::int64_t j = 0; j < c.columns; ++j) {
      const std::int64_t i = r * c.columns + j;
      const double y = scale * n.x[i] * n.gain[j];
      ASSERT_NEAR(n.y[i], y, tolerance(dtype, y, std::abs(y), c.columns)) << what << " y " << i;
      const double part = scale * n.x[i] * n.dy[i];
      dgain[j] += part, weight[j] += std::abs(part);
      const double g = n.gain[j] * n.dy[i];
      const double shrink = norm < floor ? 0 : along / squares;
      const double most = norm < floor ? 0 : std::abs(n.x[i]) * magnitude / squares;
      const double dx = scale * (g - n.x[i] * shrink);
      if (dtype == DType::kFloat16 && std::abs(dx) > 65520) {  // its largest number and a half ulp
        ASSERT_EQ(n.dx[i], std::copysign(HUGE_VAL, dx)) << what << " dx " << i;
        continue;
      }
      ASSERT_NEAR(n.dx[i], dx, tolerance(dtype, dx, scale * (std::abs(g) + most), c.columns))
          << what << " dx " << i;
    }
  }
  for (std::int64_t j = 0; j < c.columns; ++j) {
    ASSERT_NEAR(n.dgain[j], dgain[j], tolerance(dtype, dgain[j], weight[j], c.rows + c.columns))
        << what << " dgain " << j;
  }
}

void check(const Case& c) { check(c, run(c)); }

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.y, b.y, what + " y");
  expect_same_bits(a.dx, b.dx, what + " dx");
  expect_same_bits(a.dgain, b.dgain, what + " dgain");
}

}  // namespace gateloop::testing::rms_norm
