#include <cmath>
#include <utility>

#include "harness.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

double floor_of(DType dtype) {
  // As the kernel's type of sums has it.
  return dtype == DType::kFloat16 ? 0x1p-24 : dtype == DType::kFloat64 ? 1e-12 : double{1e-12f};
}

struct Norm {
  std::int64_t rows, columns;
  std::vector<double> x, gain, dy;   // as stored
  std::vector<double> y, dx, dgain;  // of the kernel
};

/// Row 1 is zero, row 2 so large that its squares are near the end of float32, row 3 has a norm
/// below the floor, where the types have room, and row 4 exactly the floor.
Norm kernel(DType dtype, std::int64_t rows, std::int64_t columns, int thread_count) {
  Random random(23);
  Tensor x(dtype, {1, rows, columns}), gain(dtype, {1, 1, columns}), dy(dtype, {1, rows, columns});
  Tensor y(dtype, {1, rows, columns}), dx(dtype, {1, rows, columns}), dgain(dtype, {1, 1, columns});
  auto values = random.normal(elements({1, rows, columns}));
  for (std::int64_t c = 0; c < columns; ++c) {
    if (rows > 1) values[columns + c] = 0;
    if (rows > 2) values[2 * columns + c] *= dtype == DType::kFloat16 ? 1e4 : 1e17;
    if (rows > 3 && dtype != DType::kFloat16) values[3 * columns + c] *= 1e-15;
    if (rows > 4) values[4 * columns + c] = c == 0 ? floor_of(dtype) : 0;
  }
  x.set(values);
  gain.set(random.normal(elements({1, 1, columns})));
  dy.set(random.normal(elements({1, rows, columns})));

  const auto of_rows = [&]<class Params>(Params p) {
    p.dtype = dtype;
    p.rows = rows;
    p.columns = columns;
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
  return {rows, columns, x.get(), gain.get(), dy.get(), y.get(), dx.get(), dgain.get()};
}

/// One rounding of the value, and those of sums of `terms` numbers and of some steps beside them.
double tolerance(DType dtype, double value, double magnitude, std::int64_t terms) {
  return half_ulp(dtype) * std::abs(value) +
         half_ulp(accumulation(dtype)) * static_cast<double>(8 + terms / 4) * magnitude +
         (dtype == DType::kFloat16 ? 0x1p-25 : 0);  // half of its least number
}

void expect_definition(const Norm& n, DType dtype, const std::string& what) {
  const double floor = floor_of(dtype);
  std::vector<double> dgain(n.columns), weight(n.columns);
  for (std::int64_t r = 0; r < n.rows; ++r) {
    double squares = 0, along = 0, magnitude = 0;
    for (std::int64_t c = 0; c < n.columns; ++c) {
      const double x = n.x[r * n.columns + c], g = n.gain[c] * n.dy[r * n.columns + c];
      squares += x * x, along += x * g, magnitude += std::abs(x * g);
    }
    const double norm = std::sqrt(squares);
    const double scale = std::sqrt(static_cast<double>(n.columns)) / std::max(norm, floor);
    for (std::int64_t c = 0; c < n.columns; ++c) {
      const std::int64_t i = r * n.columns + c;
      const double y = scale * n.x[i] * n.gain[c];
      ASSERT_NEAR(n.y[i], y, tolerance(dtype, y, std::abs(y), n.columns)) << what << " y " << i;
      const double part = scale * n.x[i] * n.dy[i];
      dgain[c] += part, weight[c] += std::abs(part);
      const double g = n.gain[c] * n.dy[i];
      const double shrink = norm < floor ? 0 : along / squares;
      const double most = norm < floor ? 0 : std::abs(n.x[i]) * magnitude / squares;
      const double dx = scale * (g - n.x[i] * shrink);
      if (dtype == DType::kFloat16 && std::abs(dx) > 65520) {  // its largest number and a half ulp
        ASSERT_EQ(n.dx[i], std::copysign(HUGE_VAL, dx)) << what << " dx " << i;
        continue;
      }
      ASSERT_NEAR(n.dx[i], dx, tolerance(dtype, dx, scale * (std::abs(g) + most), n.columns))
          << what << " dx " << i;
    }
  }
  for (std::int64_t c = 0; c < n.columns; ++c) {
    ASSERT_NEAR(n.dgain[c], dgain[c], tolerance(dtype, dgain[c], weight[c], n.rows + n.columns))
        << what << " dgain " << c;
  }
}

/// Around vectors of 1 to 64 lanes, and around groups of rows.
constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {1, 1}, {3, 0}, {0, 5}, {5, 7}, {3, 64}, {4, 65}, {128, 3}, {129, 31}, {300, 129}};

TEST(RmsNorm, AndItsAdjointEqualTheDefinition) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kRealDTypes) {
      for (const auto& [rows, columns] : kShapes) {
        expect_definition(kernel(dtype, rows, columns, 2), dtype,
                          target + " " + name(dtype) + " " + std::to_string(rows) + "x" +
                              std::to_string(columns));
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(RmsNorm, IsTheSameForAnyNumberOfThreads) {
  for (const DType dtype : kRealDTypes) {
    const auto one = kernel(dtype, 700, 129, 1), three = kernel(dtype, 700, 129, 3);
    expect_same_bits(one.y, three.y, name(dtype));
    expect_same_bits(one.dx, three.dx, name(dtype));
    expect_same_bits(one.dgain, three.dgain, name(dtype));
  }
}

TEST(RmsNorm, RefusesComplexNumbersAndNegativeSizes) {
  expect_refusals<recurrence::RmsNorm>();
  expect_refusals<recurrence::RmsNormBackward>();
}

}  // namespace
}  // namespace gateloop::testing
