// Products with stored weights, and operations on rows, against double precision on every target.
#include "recurrence/inference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "harness.h"
#include "recurrence/cpu/half.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

using recurrence::Matrix;
using recurrence::Storage;

constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16,
                                 Storage::kInt8};

/// A matrix in its storage and as the numbers that it stands for.
struct Stored {
  std::vector<std::byte> bytes;
  std::vector<float> scales;
  std::vector<double> numbers;
  Matrix matrix;

  Stored(Storage storage, std::int64_t rows, std::int64_t columns, Random& random) {
    const auto count = static_cast<std::size_t>(rows * columns);
    const auto size = recurrence::storage_bytes(storage);
    bytes.resize(count * size);
    const auto drawn = random.normal(count);
    for (std::int64_t r = 0; r < rows; ++r) scales.push_back(0.01f * static_cast<float>(r + 1));
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = static_cast<float>(drawn[i]);
      std::byte* const to = bytes.data() + i * size;
      if (storage == Storage::kFloat32) {
        std::memcpy(to, &value, size);
        numbers.push_back(static_cast<double>(value));
      } else if (storage == Storage::kBFloat16) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        bits &= 0xFFFF0000u;
        const auto high = static_cast<std::uint16_t>(bits >> 16);
        std::memcpy(to, &high, size);
        float kept = 0;
        std::memcpy(&kept, &bits, sizeof kept);
        numbers.push_back(static_cast<double>(kept));
      } else if (storage == Storage::kFloat16) {
        const std::uint16_t half = recurrence::cpu::half_from_float(value);
        std::memcpy(to, &half, size);
        numbers.push_back(static_cast<double>(recurrence::cpu::float_from_half(half)));
      } else {
        // -128 and 127 too, the ends of the range.
        const auto integer = static_cast<signed char>(i % 7 == 0   ? -128
                                                      : i % 5 == 0 ? 127
                                                                   : std::lround(20 * value) % 128);
        std::memcpy(to, &integer, size);
        const auto row = static_cast<std::int64_t>(i) / std::max<std::int64_t>(1, columns);
        numbers.push_back(integer * static_cast<double>(scales[static_cast<std::size_t>(row)]));
      }
    }
    matrix = {storage, rows, columns, bytes.data(),
              storage == Storage::kInt8 ? scales.data() : nullptr};
  }
};

/// Numbers between one row of x and the next, beside its own.
constexpr std::size_t kMargin = 5;

/// Halves to even.
float nearest_bfloat16(float value) {
  auto bits = std::bit_cast<std::uint32_t>(value);
  bits += 0x7FFF + (bits >> 16 & 1);
  return std::bit_cast<float>(bits & 0xFFFF0000u);
}

struct Expected {
  double value = 0, bound = 0;
};
/// x[m] · w[n] + bias[n], and how far float32 may lie: a rounding of each of columns / 4 + 8
/// partial sums of at most Σ|w x|; with int8 also x rounded by 2^-16 of its largest. With bfloat16
/// x itself is rounded, and its products have no other error.
Expected expected(const Stored& w, const std::vector<float>& x, std::int64_t m, std::int64_t n,
                  double bias) {
  const auto columns = static_cast<std::size_t>(w.matrix.columns);
  const float* const row = x.data() + static_cast<std::size_t>(m) * (columns + kMargin);
  double magnitude = std::fabs(bias), weights = 0, most = 0;
  Expected out{bias, 0};
  for (std::size_t c = 0; c < columns; ++c) {
    const double weight = w.numbers[static_cast<std::size_t>(n) * columns + c];
    const auto value = static_cast<double>(
        w.matrix.storage == Storage::kBFloat16 ? nearest_bfloat16(row[c]) : row[c]);
    out.value += weight * value;
    magnitude += std::fabs(weight * value);
    weights += std::fabs(weight);
    most = std::max(most, std::fabs(value));
  }
  out.bound = magnitude * (static_cast<double>(columns) / 4 + 8) * 0x1p-24;
  if (w.matrix.storage == Storage::kInt8) out.bound += weights * most * 0x1p-16;
  return out;
}

void expect_product(Storage storage, std::int64_t rows, std::int64_t out, std::int64_t columns,
                    bool with_bias) {
  Random random(3);
  const Stored w(storage, out, columns, random);
  const auto to_floats = [&](std::int64_t n) {
    std::vector<float> values;
    for (const double value : random.normal(static_cast<std::size_t>(n)))
      values.push_back(static_cast<float>(value));
    return values;
  };
  const auto x_stride = columns + static_cast<std::int64_t>(kMargin);
  const auto x = to_floats(rows * x_stride), bias = to_floats(out);
  const std::int64_t stride = out + 3;
  std::vector<float> y(static_cast<std::size_t>(rows * stride), -7.0f), again = y;
  recurrence::Product p{.matrix = w.matrix,
                        .rows = rows,
                        .x = x.data(),
                        .x_stride = x_stride,
                        .bias = with_bias ? bias.data() : nullptr,
                        .y = y.data(),
                        .y_stride = stride};
  execute(p, 2);
  p.y = again.data();
  execute(p, 1);
  EXPECT_EQ(y, again) << "threads change bits";
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t n = 0; n < stride; ++n) {
      const double actual = static_cast<double>(y[static_cast<std::size_t>(m * stride + n)]);
      if (n >= out) {
        ASSERT_EQ(actual, -7) << "written behind a row";
        continue;
      }
      const double b = with_bias ? static_cast<double>(bias[static_cast<std::size_t>(n)]) : 0;
      const auto [value, bound] = expected(w, x, m, n, b);
      ASSERT_NEAR(actual, value, bound) << m << ", " << n;
    }
  }
}

TEST(Inference, ProductsEqualTheirDefinition) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const Storage storage : kStorages) {
      // Around panels, tiles and blocks: 1 to 4 rows are dot products.
      for (const auto& [rows, out, columns] : {std::tuple{1, 5, 7},
                                               {3, 50, 65},
                                               {4, 1, 600},
                                               {5, 7, 33},
                                               {8, 12, 34},
                                               {16, 5, 31},
                                               {17, 49, 513},
                                               {32, 9, 66},
                                               {128, 48, 10},
                                               {33, 6, 1},
                                               {130, 100, 64},
                                               {2, 600, 500},  // large: is_prefetched()
                                               {2, 3, 9000}}) {
        SCOPED_TRACE(target + " storage " + std::to_string(static_cast<int>(storage)) + " of " +
                     std::to_string(rows) + ", " + std::to_string(out) + ", " +
                     std::to_string(columns));
        expect_product(storage, rows, out, columns, rows % 2 == 1);
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(Inference, DrawnProductsEqualTheirDefinition) {
  for_drawn_cases(60, [](Random& random, std::uint64_t) {
    const Storage storage = kStorages[random.integer(0, std::ssize(kStorages) - 1)];
    const std::int64_t rows = random.integer(1, 140), out = random.integer(1, 120),
                       columns = random.integer(1, 700);
    expect_product(storage, rows, out, columns, random.integer(0, 1) == 1);
  });
}

TEST(Inference, Int8OfWhatIsNotFiniteIsNotANumber) {
  Random random(5);
  const Stored w(Storage::kInt8, 2, 40, random);
  for (const float fault : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> x(40, 1.0f), y(2);
    x[39] = fault;
    std::vector<std::byte> arranged(recurrence::arranged_bytes(Storage::kInt8, 40));
    recurrence::arrange(Storage::kInt8, x.data(), 40, arranged.data());
    recurrence::multiply_rows(w.matrix, arranged.data(), 0, 2, nullptr, y.data());
    EXPECT_TRUE(std::isnan(y[0]) && std::isnan(y[1])) << fault;
  }
}

/// (rows, w.rows) of x (rows, w.columns).
std::vector<float> multiply(const Matrix& w, const std::vector<float>& x, std::int64_t rows) {
  std::vector<float> y(static_cast<std::size_t>(rows * w.rows));
  execute(recurrence::Product{.matrix = w,
                              .rows = rows,
                              .x = x.data(),
                              .x_stride = w.columns,
                              .y = y.data(),
                              .y_stride = w.rows},
          2);
  return y;
}

TEST(Inference, SumsOfInt8FitTheirInteger) {
  constexpr std::int64_t kRows = 6, kColumns = 1024;
  const std::vector<std::int8_t> weights(kColumns, -128);
  const float scale = 1;
  std::vector<float> x(kRows * kColumns);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = i / kColumns % 2 == 0 ? 1.0f : -1.0f;
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    const auto y = multiply({Storage::kInt8, 1, kColumns, weights.data(), &scale}, x, kRows);
    for (std::size_t m = 0; m < y.size(); ++m)
      EXPECT_NEAR(y[m], (m % 2 == 0 ? -128 : 128) * kColumns, 1) << target;
  }
  recurrence::cpu::force_target("");
}

TEST(Inference, WhatIsNotFiniteStaysInItsRow) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const Storage storage : kStorages) {
      Random random(5);
      constexpr std::int64_t kRows = 20, kFaulty = 17, kColumns = 41;
      const Stored w(storage, 3, kColumns, random);
      // Rounding the last as a number would carry into its sign.
      for (const float fault : {INFINITY, -INFINITY, NAN, std::bit_cast<float>(0x7FFFFFFFu)}) {
        std::vector<float> x(kRows * kColumns, 1.0f);
        x[kFaulty * kColumns + kColumns - 1] = fault;
        const auto y = multiply(w.matrix, x, kRows);
        for (std::size_t i = 0; i < y.size(); ++i) {
          EXPECT_EQ(std::isfinite(y[i]), i / 3 != kFaulty)
              << target << " storage " << static_cast<int>(storage) << " " << fault << " " << i;
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

void check_head_step(std::int64_t keys, std::int64_t values, bool complex, bool per_key) {
  Random random(7);
  const auto floats = [&](std::int64_t n) {
    const auto drawn = random.normal(static_cast<std::size_t>(n));
    return std::vector<float>(drawn.begin(), drawn.end());
  };
  const auto q = floats(keys), k = floats(keys), v = floats(values);
  const std::size_t parts = complex ? 2 : 1;
  const auto a = floats(static_cast<std::int64_t>(parts) * (per_key ? keys : 1));
  auto state = floats(2 * keys * values);
  const auto before = state;
  std::vector<float> y(v.size());
  recurrence::run(recurrence::HeadStep{keys, values, complex, per_key, a.data(), q.data(), k.data(),
                                       v.data(), state.data(), y.data()});
  std::vector<double> expected(y.size());
  for (std::size_t i = 0; i < k.size(); ++i) {
    const double a_re = a[per_key ? i * parts : 0];
    const double a_im = complex ? a[per_key ? i * parts + 1 : 1] : 0;
    for (std::size_t j = 0; j < y.size(); ++j) {
      const std::size_t at = i * y.size() + j, im_at = at + k.size() * y.size();
      const double re = before[at], im = complex ? before[im_at] : 0;
      const double next = a_re * re - a_im * im + k[i] * v[j];
      // Three roundings of terms of some units.
      ASSERT_NEAR(state[at], next, 4e-6);
      ASSERT_NEAR(state[im_at], complex ? a_re * im + a_im * re : before[im_at], 4e-6);
      expected[j] += q[i] * next;
    }
  }
  for (std::size_t j = 0; j < y.size(); ++j) ASSERT_NEAR(y[j], expected[j], 5e-5);
}

TEST(Inference, AHeadStepsAsDefined) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const auto& [keys, values] : {std::pair{1, 1}, {3, 3}, {8, 17}, {17, 5}}) {
      for (const bool complex : {false, true}) {
        for (const bool per_key : {false, true}) check_head_step(keys, values, complex, per_key);
      }
    }
  }
  recurrence::cpu::force_target("");
}

/// Of a sequence of `steps` whose last `queries` are computed, beside the definition in double.
void check_attention(std::int64_t steps, std::int64_t queries, std::int64_t window, std::int64_t d,
                     bool softmax) {
  Random random(7);
  const auto floats = [&](std::int64_t n) {
    std::vector<float> values;
    for (const double x : random.normal(static_cast<std::size_t>(n)))
      values.push_back(static_cast<float>(x));
    return values;
  };
  const std::int64_t q_stride = d + 3, y_stride = d + 5, first = steps - queries;
  const auto q = floats(queries * q_stride), keys = floats(steps * d);
  auto values = floats(steps * d);
  const auto original = values;
  std::vector<float> y(static_cast<std::size_t>(queries * y_stride), 7);
  recurrence::AttentionHead p{.queries = queries,
                              .count = first + 1,
                              .window = window,
                              .dim_head = d,
                              .softmax = softmax,
                              .q = q.data(),
                              .q_stride = q_stride,
                              .keys = keys.data(),
                              .values = values.data(),
                              .y = y.data(),
                              .y_stride = y_stride};
  std::vector<float> scratch(static_cast<std::size_t>(recurrence::scratch_numbers(p)));
  recurrence::run(p, scratch.data());
  const auto at = [](const std::vector<float>& x, std::int64_t i) {
    return static_cast<double>(x[static_cast<std::size_t>(i)]);
  };
  for (std::int64_t m = 0; m < queries; ++m) {
    std::vector<double> weights, magnitudes;  // of what a weight is the sum of
    const std::int64_t oldest = window == 0 ? 0 : std::max(std::int64_t{0}, first + m + 1 - window);
    for (std::int64_t s = oldest; s <= first + m; ++s) {
      double score = 0, magnitude = 0;
      for (std::int64_t c = 0; c < d; ++c) {
        const double term = at(q, m * q_stride + c) * at(keys, s * d + c);
        score += term;
        magnitude += std::abs(term);
      }
      weights.push_back(score / std::sqrt(static_cast<double>(d)));
      magnitudes.push_back(magnitude / std::sqrt(static_cast<double>(d)));
    }
    if (softmax) {
      double sum = 0;
      for (double& w : weights) sum += w = std::exp(w);
      for (double& w : weights) w /= sum;
      magnitudes = weights;
    }
    for (std::int64_t c = 0; c < d; ++c) {
      double expected = 0, size = 0;
      for (std::int64_t s = oldest; s <= first + m; ++s) {
        const auto i = static_cast<std::size_t>(s - oldest);
        const double value = at(values, s * d + c);
        expected += weights[i] * value;
        size += magnitudes[i] * std::abs(value);
      }
      ASSERT_NEAR(at(y, m * y_stride + c), expected, 2e-6 * size + 1e-7)
          << steps << ' ' << queries << ' ' << window << ' ' << d << ' ' << softmax;
    }
    for (std::int64_t c = d; c < y_stride; ++c) ASSERT_EQ(at(y, m * y_stride + c), 7);
  }
  // What a step has that is no number reaches no step before it.
  values.back() = std::numeric_limits<float>::infinity();
  const auto before = y;
  recurrence::run(p, scratch.data());
  ASSERT_TRUE(std::equal(y.begin(), y.end() - y_stride, before.begin()));
  ASSERT_FALSE(std::isfinite(at(y, (queries - 1) * y_stride + d - 1)));
  // Nor one that is a window later.
  values = original;
  values[static_cast<std::size_t>(d - 1)] = std::numeric_limits<float>::infinity();
  recurrence::run(p, scratch.data());
  for (std::int64_t m = 0; m < queries; ++m) {
    const bool reads = window == 0 || first + m < window;
    ASSERT_EQ(std::isfinite(at(y, m * y_stride + d - 1)), !reads) << m;
  }
}

TEST(Inference, AttentionIsAsDefined) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const auto& [steps, queries] :
         {std::pair{1, 1}, {5, 5}, {40, 1}, {300, 1}, {300, 75}, {520, 33}, {70, 70}}) {
      for (const std::int64_t d : {1, 8, 16, 33, 64, 72}) {
        for (const std::int64_t window : {0, 1, 5, 40, 300, 1000}) {
          for (const bool softmax : {false, true})
            check_attention(steps, queries, window, d, softmax);
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(Inference, AttentionOfLargeScoresIsFinite) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    const std::vector<float> q = {1e3f}, keys = {-1e3f, 1e3f, 0}, values = {1, 2, 3};
    float y = 0;
    recurrence::AttentionHead p{.queries = 1,
                                .count = 3,
                                .dim_head = 1,
                                .q = q.data(),
                                .keys = keys.data(),
                                .values = values.data(),
                                .y = &y};
    std::vector<float> scratch(static_cast<std::size_t>(recurrence::scratch_numbers(p)));
    recurrence::run(p, scratch.data());
    EXPECT_EQ(y, 2);
    const std::vector<float> broken = {0, std::numeric_limits<float>::quiet_NaN(), 0};
    p.keys = broken.data();
    recurrence::run(p, scratch.data());
    EXPECT_TRUE(std::isnan(y));
  }
  recurrence::cpu::force_target("");
}

}  // namespace
}  // namespace gateloop::testing
