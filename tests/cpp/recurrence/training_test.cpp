// What a training step does to rows, by its definition in double precision: every instruction set,
// dtype and length around a vector; the same bits for any number of threads.
#include "recurrence/training.h"

#include <utility>

#include "harness.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

using recurrence::Norm;
using Numbers = std::vector<double>;

constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {{1, 1},  {3, 0},    {0, 5},    {5, 7},
                                                             {3, 64}, {129, 31}, {300, 129}};
constexpr Norm kNorms[] = {Norm::kRms, Norm::kLayer};

template <class Work>
void on_every_target(const Work& work) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    SCOPED_TRACE(target);
    for (const DType dtype : kRealDTypes) {
      SCOPED_TRACE(name(dtype));
      work(dtype);
    }
  }
  recurrence::cpu::force_target("");
}

/// One rounding to `dtype`, and `steps` of the wide type, of numbers as large as `magnitude`.
void expect_near(double value, double expected, DType dtype, double steps, double magnitude,
                 const char* what) {
  const double tolerance = half_ulp(dtype) * std::abs(expected) + subnormal_loss(dtype) +
                           half_ulp(accumulation(dtype)) * steps * magnitude;
  ASSERT_NEAR(value, expected, tolerance) << what;
}

// ---- Residual connections and norms
// --------------------------------------------------------------

struct NormCase {
  DType dtype;
  Norm norm;
  std::int64_t rows, columns;
  bool has_y = true, has_dsum = true, has_dwide = true;
  int threads = 2;
};

struct NormOutcome {
  Numbers x, y, gain, bias, dsum, dnormalised, dwide;   // as stored
  Numbers sum, normalised, wide, dx, dy, dgain, dbias;  // of the kernels
};

/// Row 1 is zero where there is y, so that a norm below ε is among them.
NormOutcome run(const NormCase& c) {
  Random random(31);
  const DType wide_type = accumulation(c.dtype);
  const Dims matrix{1, c.rows, c.columns}, row{1, 1, c.columns};
  const auto drawn = [&](DType dtype, const Dims& dims) {
    Tensor t(dtype, dims);
    t.set(random.normal(elements(dims)));
    return t;
  };
  Tensor x = drawn(wide_type, matrix), y = drawn(c.dtype, matrix), gain = drawn(wide_type, row),
         bias = drawn(wide_type, row), dsum = drawn(wide_type, matrix),
         dnormalised = drawn(c.dtype, matrix), dwide = drawn(wide_type, matrix);
  if (c.rows > 1) {
    Numbers of_x = x.get(), of_y = y.get();
    for (std::int64_t j = 0; j < c.columns; ++j) of_x[c.columns + j] = of_y[c.columns + j] = 0;
    x.set(of_x), y.set(of_y);
  }
  Tensor sum(wide_type, matrix), normalised(c.dtype, matrix), wide(wide_type, matrix);
  const bool is_layer = c.norm == Norm::kLayer;
  execute(recurrence::ResidualNorm{.dtype = c.dtype,
                                   .norm = c.norm,
                                   .rows = c.rows,
                                   .columns = c.columns,
                                   .x = x.data(),
                                   .y = c.has_y ? y.data() : nullptr,
                                   .gain = gain.data(),
                                   .bias = is_layer ? bias.data() : nullptr,
                                   .sum = c.has_y ? sum.data() : nullptr,
                                   .normalised = normalised.data(),
                                   .normalised_wide = wide.data()},
          c.threads);
  Tensor dx(wide_type, matrix), dy(c.dtype, matrix), dgain(wide_type, row), dbias(wide_type, row);
  execute(recurrence::ResidualNormBackward{.dtype = c.dtype,
                                           .norm = c.norm,
                                           .rows = c.rows,
                                           .columns = c.columns,
                                           .sum = c.has_y ? sum.data() : x.data(),
                                           .gain = gain.data(),
                                           .dsum = c.has_dsum ? dsum.data() : nullptr,
                                           .dnormalised = dnormalised.data(),
                                           .dnormalised_wide = c.has_dwide ? dwide.data() : nullptr,
                                           .dx = dx.data(),
                                           .dy = dy.data(),
                                           .dgain = dgain.data(),
                                           .dbias = is_layer ? dbias.data() : nullptr},
          c.threads);
  for (const Tensor* t : {&sum, &normalised, &wide, &dx, &dy, &dgain, &dbias}) {
    t->expect_guards_intact("output");
  }
  return {x.get(),           y.get(),     gain.get(),  bias.get(),       dsum.get(),
          dnormalised.get(), dwide.get(), sum.get(),   normalised.get(), wide.get(),
          dx.get(),          dy.get(),    dgain.get(), dbias.get()};
}

/// One row in double precision, from the sum that the kernel stored.
void check_row(const NormCase& c, const NormOutcome& n, std::int64_t r, Numbers& dgain,
               Numbers& dbias, Numbers& weight) {
  const std::int64_t columns = c.columns, first = r * columns;
  const DType wide = accumulation(c.dtype);
  const auto count = static_cast<double>(columns);
  const Numbers& row = c.has_y ? n.sum : n.x;
  double mean = 0, squares = 0;
  for (std::int64_t j = 0; j < columns; ++j) mean += row[first + j] / count;
  if (c.norm == Norm::kRms) mean = 0;
  for (std::int64_t j = 0; j < columns; ++j) squares += std::pow(row[first + j] - mean, 2);
  constexpr double floor = 1e-12;  // of rows in float32, whatever becomes of them
  const bool constant = c.norm == Norm::kRms && std::sqrt(squares) < floor;
  const double scale = c.norm == Norm::kRms ? std::sqrt(count) / std::max(std::sqrt(squares), floor)
                                            : 1 / std::sqrt(squares / count + 1e-5);
  double shift = 0, along = 0, size = 0;
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t i = first + j;
    const double unit = (row[i] - mean) * scale;
    const double d = n.dnormalised[i] + (c.has_dwide ? n.dwide[i] : 0);
    shift += n.gain[j] * d / count, along += unit * n.gain[j] * d / count;
    size += std::abs(n.gain[j] * d) / count * (1 + std::abs(unit));
    dgain[j] += unit * d, dbias[j] += d;
    weight[j] += (1 + std::abs(unit)) * std::abs(d);
  }
  if (c.norm == Norm::kRms) shift = 0;
  if (constant) along = 0;
  const double steps = 16 + count / 4;
  for (std::int64_t j = 0; j < columns; ++j) {
    const std::int64_t i = first + j;
    if (c.has_y) expect_near(n.sum[i], n.x[i] + n.y[i], wide, 1, 3, "sum");
    const double unit = (row[i] - mean) * scale;
    const double bias = c.norm == Norm::kLayer ? n.bias[j] : 0;
    const double value = unit * n.gain[j] + bias;
    const double spread = (1 + std::abs(mean) * scale) * (1 + std::abs(unit));
    const double magnitude = spread * std::abs(n.gain[j]) + std::abs(bias);
    expect_near(n.normalised[i], value, c.dtype, steps, magnitude, "normalised");
    expect_near(n.wide[i], value, wide, steps, magnitude, "normalised_wide");
    const double d = n.dnormalised[i] + (c.has_dwide ? n.dwide[i] : 0);
    const double dx = (c.has_dsum ? n.dsum[i] : 0) + scale * (n.gain[j] * d - shift - unit * along);
    const double most =
        3 + scale * spread * spread * (std::abs(n.gain[j] * d) + size * (1 + std::abs(unit)));
    expect_near(n.dx[i], dx, wide, steps, most, "dx");
    if (c.dtype == DType::kFloat16 && std::abs(dx) > 65520) {  // its largest number, a half ulp
      ASSERT_EQ(n.dy[i], std::copysign(HUGE_VAL, dx)) << "dy";
      continue;
    }
    expect_near(n.dy[i], dx, c.dtype, steps, most, "dy");
  }
}

void check(const NormCase& c) {
  const NormOutcome n = run(c);
  Numbers dgain(c.columns), dbias(c.columns), weight(c.columns);
  for (std::int64_t r = 0; r < c.rows; ++r) check_row(c, n, r, dgain, dbias, weight);
  const double steps = 16 + static_cast<double>(c.rows + c.columns) / 4;
  for (std::int64_t j = 0; j < c.columns; ++j) {
    expect_near(n.dgain[j], dgain[j], accumulation(c.dtype), steps, weight[j], "dgain");
    if (c.norm == Norm::kLayer) {
      expect_near(n.dbias[j], dbias[j], accumulation(c.dtype), steps, weight[j], "dbias");
    }
  }
}

TEST(ResidualNorm, AndItsAdjointEqualTheDefinition) {
  on_every_target([](DType dtype) {
    for (const Norm norm : kNorms) {
      for (const auto& [rows, columns] : kShapes) {
        check({.dtype = dtype, .norm = norm, .rows = rows, .columns = columns});
      }
      check({.dtype = dtype, .norm = norm, .rows = 9, .columns = 33, .has_y = false});
      check({.dtype = dtype, .norm = norm, .rows = 9, .columns = 33, .has_dsum = false});
      check({.dtype = dtype, .norm = norm, .rows = 9, .columns = 33, .has_dwide = false});
    }
  });
}

TEST(ResidualNorm, DrawnRowsEqualTheDefinition) {
  for_drawn_cases(100, [](Random& random, std::uint64_t) {
    const int given = static_cast<int>(random.integer(1, 3));
    check({.dtype = kRealDTypes[random.integer(0, std::ssize(kRealDTypes) - 1)],
           .norm = kNorms[random.integer(0, 1)],
           .rows = random.integer(0, 400),
           .columns = random.integer(0, 300),
           .has_y = random.integer(0, 3) != 0,
           .has_dsum = given != 1,
           .has_dwide = given != 2,
           .threads = static_cast<int>(random.integer(1, 4))});
  });
}

TEST(ResidualNorm, IsTheSameForAnyNumberOfThreads) {
  for (const DType dtype : kRealDTypes) {
    for (const Norm norm : kNorms) {
      NormCase c{.dtype = dtype, .norm = norm, .rows = 700, .columns = 129, .threads = 1};
      const NormOutcome one = run(c);
      c.threads = 3;
      const NormOutcome three = run(c);
      expect_same_bits(one.normalised, three.normalised, "normalised");
      expect_same_bits(one.dx, three.dx, "dx");
      expect_same_bits(one.dgain, three.dgain, "dgain");
      expect_same_bits(one.dbias, three.dbias, "dbias");
    }
  }
}

TEST(ResidualNorm, RefusesComplexNumbersAndNegativeSizes) {
  expect_refusals<recurrence::ResidualNorm>();
  expect_refusals<recurrence::ResidualNormBackward>();
}

// ---- Activations
// ---------------------------------------------------------------------------------

/// Through zero, over both tails of erf, and to where exponentials underflow.
Numbers arguments(std::int64_t n) {
  Numbers values(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    const double place = n == 1 ? 0.3 : 2 * static_cast<double>(i) / static_cast<double>(n - 1) - 1;
    values[i] = place * (i % 3 == 0 ? 60 : 6);
  }
  return values;
}

constexpr std::int64_t kLengths[] = {0, 1, 5, 31, 64, 4095, 4097, 20'001};

/// Nothing is left of the density far out, where x would make it large again.
TEST(Gelu, HasItsLimitsFarOut) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    const Dims dims{1, 1, 4};
    Tensor x(DType::kFloat32, dims), dy(DType::kFloat32, dims), dx(DType::kFloat32, dims);
    x.set(Numbers{-1e38, -1e20, 1e20, 1e38});
    dy.set(Numbers{1, 1, 1, 1});
    execute(recurrence::GeluBackward{.dtype = DType::kFloat32,
                                     .elements = 4,
                                     .x = x.data(),
                                     .dy = dy.data(),
                                     .dx = dx.data()},
            1);
    EXPECT_EQ(dx.get(), (Numbers{0, 0, 1, 1})) << target;
  }
  recurrence::cpu::force_target("");
}

struct Operands {
  Operands(DType dtype, std::int64_t n)
      : dims{1, 1, n},
        a(dtype, dims),
        b(dtype, dims),
        dy(dtype, dims),
        y(dtype, dims),
        da(dtype, dims),
        db(dtype, dims) {
    Random random(5);
    a.set(arguments(n)), b.set(random.normal(n)), dy.set(random.normal(n));
  }
  Dims dims;
  Tensor a, b, dy, y, da, db;
};

TEST(Gelu, AndItsAdjointEqualTheDefinition) {
  on_every_target([](DType dtype) {
    for (const std::int64_t n : kLengths) {
      Operands o(dtype, n);
      execute(recurrence::Gelu{.dtype = dtype, .elements = n, .x = o.a.data(), .y = o.y.data()}, 2);
      execute(
          recurrence::GeluBackward{
              .dtype = dtype, .elements = n, .x = o.a.data(), .dy = o.dy.data(), .dx = o.da.data()},
          2);
      o.y.expect_guards_intact("y");
      o.da.expect_guards_intact("dx");
      const Numbers x = o.a.get(), dy = o.dy.get(), y = o.y.get(), dx = o.da.get();
      for (std::int64_t i = 0; i < n; ++i) {
        const double below = 0.5 * std::erfc(-x[i] * std::sqrt(0.5));
        const double density = std::exp(-x[i] * x[i] / 2) / std::sqrt(8 * std::atan(1.0));
        // 1 + erf cancels below zero, as in torch: the error is that of erf, near 1.
        expect_near(y[i], x[i] * below, dtype, 4, std::abs(x[i]), "y");
        const double slope = below + x[i] * density;
        expect_near(dx[i], slope * dy[i], dtype, 8, 1.2 * std::abs(dy[i]), "dx");
      }
    }
  });
}

TEST(SwishGate, AndItsAdjointEqualTheDefinition) {
  on_every_target([](DType dtype) {
    for (const std::int64_t n : kLengths) {
      Operands o(dtype, n);
      execute(
          recurrence::SwishGate{
              .dtype = dtype, .elements = n, .g = o.a.data(), .x = o.b.data(), .y = o.y.data()},
          2);
      execute(recurrence::SwishGateBackward{.dtype = dtype,
                                            .elements = n,
                                            .g = o.a.data(),
                                            .x = o.b.data(),
                                            .dy = o.dy.data(),
                                            .dg = o.da.data(),
                                            .dx = o.db.data()},
              2);
      for (const Tensor* t : {&o.y, &o.da, &o.db}) t->expect_guards_intact("output");
      const Numbers g = o.a.get(), x = o.b.get(), dy = o.dy.get();
      const Numbers y = o.y.get(), dg = o.da.get(), dx = o.db.get();
      for (std::int64_t i = 0; i < n; ++i) {
        const double s = 1 / (1 + std::exp(-g[i])), rest = 1 / (1 + std::exp(g[i]));
        const double swish = g[i] * s, slope = s + swish * rest;
        expect_near(y[i], swish * x[i], dtype, 8, std::abs(swish * x[i]), "y");
        expect_near(dx[i], swish * dy[i], dtype, 8, std::abs(swish * dy[i]), "dx");
        expect_near(dg[i], slope * x[i] * dy[i], dtype, 8,
                    (s + std::abs(swish)) * std::abs(x[i] * dy[i]), "dg");
      }
    }
  });
}

template <class Params>
void expect_activation_refusals() {
  Params p;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.dtype = DType::kFloat32;
  p.elements = -1;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
}

TEST(Activations, RefuseComplexNumbersAndNegativeSizes) {
  expect_activation_refusals<recurrence::Gelu>();
  expect_activation_refusals<recurrence::GeluBackward>();
  expect_activation_refusals<recurrence::SwishGate>();
  expect_activation_refusals<recurrence::SwishGateBackward>();
}

}  // namespace
}  // namespace gateloop::testing
