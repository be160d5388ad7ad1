#include "harness.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "recurrence/cpu/target.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace gateloop::testing {
namespace {

constexpr std::byte kGuard{0xA5};
constexpr std::size_t kMargin = 256;

std::size_t real_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kComplex128:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kComplex64:
      return 4;
  }
  throw std::invalid_argument("no dtype");
}

/// Value of a binary format of `exponent` and `mantissa` bits with the exponent bias `bias`.
double decode(std::uint16_t bits, int mantissa, int bias) {
  const int exponent = (bits & 0x7FFF) >> mantissa;
  const int fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << (15 - mantissa)) - 1) return fraction ? std::nan("") : sign * INFINITY;
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias - mantissa)
                       : sign * std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
}

/// To nearest even, by the definition: scale to integers, nearbyint, and let a carry ripple up.
std::uint16_t encode(double value, int mantissa, int bias) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const int infinity = ((1 << (15 - mantissa)) - 1) << mantissa;
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | infinity | 1 << (mantissa - 1));
  const double magnitude = std::fabs(value);
  if (std::isinf(value)) return static_cast<std::uint16_t>(sign | infinity);
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  const double fraction = std::nearbyint(std::ldexp(magnitude, mantissa - exponent));
  const double bits = std::ldexp(exponent + bias - 1, mantissa) + fraction;
  return static_cast<std::uint16_t>(sign | static_cast<int>(std::min<double>(bits, infinity)));
}

double read(const std::byte* p, DType dtype) {
  const auto as = [&]<class T>(T value) {
    std::memcpy(&value, p, sizeof value);
    return value;
  };
  switch (dtype) {
    case DType::kFloat64:
    case DType::kComplex128:
      return as(double{});
    case DType::kBFloat16:
      return decode(as(std::uint16_t{}), 7, 127);
    case DType::kFloat16:
      return decode(as(std::uint16_t{}), 10, 15);
    case DType::kFloat32:
    case DType::kComplex64:
      return as(float{});
  }
  throw std::invalid_argument("no dtype");
}

void write(std::byte* p, DType dtype, double value) {
  const auto put = [&](auto stored) { std::memcpy(p, &stored, sizeof stored); };
  switch (dtype) {
    case DType::kFloat64:
    case DType::kComplex128:
      return put(value);
    case DType::kBFloat16:
      return put(encode(value, 7, 127));
    case DType::kFloat16:
      return put(encode(value, 10, 15));
    case DType::kFloat32:
    case DType::kComplex64:
      return put(static_cast<float>(value));
  }
}

}  // namespace

std::string name(DType dtype) {
  constexpr const char* kNames[] = {"float32",    "float64",  "complex64",
                                    "complex128", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

DType accumulation(DType dtype) { return real_bytes(dtype) == 2 ? DType::kFloat32 : dtype; }

bool is_complex(DType dtype) { return dtype == DType::kComplex64 || dtype == DType::kComplex128; }

double half_ulp(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kComplex128:
      return 0x1p-53;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kFloat32:
    case DType::kComplex64:
      return 0x1p-24;
  }
  throw std::invalid_argument("no dtype");
}

double subnormal_loss(DType dtype) {
  if (dtype == DType::kFloat16) return 0x1p-25;
  return 4 * (real_bytes(dtype) == 8 ? 0x1p-1022 : 0x1p-126);
}

Tensor::Tensor(DType dtype, Dims dims, Layout layout, std::int64_t parts)
    : dtype_(dtype), dims_(dims), element_(real_bytes(dtype) * (is_complex(dtype) ? 2 : 1)) {
  dims_.channels *= parts;
  width_ = dims_.channels;
  time_stride_ = layout == Layout::kProjection ? 3 * width_ : width_;
  batch_stride_ = time_stride_ * dims_.time + (layout == Layout::kProjection ? 5 : 0);
  if (layout == Layout::kBroadcast) batch_stride_ = time_stride_ = 0;
  const std::int64_t span = std::max<std::int64_t>(batch_stride_ * dims_.batch, width_) + width_;
  bytes_.assign(2 * kMargin + 128 + static_cast<std::size_t>(span) * element_, kGuard);

  const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data()) + kMargin;
  origin_ = kMargin + (64 - address % 64) % 64;
  if (layout == Layout::kMisaligned) origin_ += element_;
  if (layout == Layout::kProjection) origin_ += static_cast<std::size_t>(width_) * element_;
  if (layout == Layout::kNegative && elements(dims_) > 0) {
    origin_ += static_cast<std::size_t>((dims_.batch - 1) * batch_stride_ +
                                        (dims_.time - 1) * time_stride_) *
               element_;
    batch_stride_ = -batch_stride_;
    time_stride_ = -time_stride_;
  }
}

std::size_t Tensor::offset(std::int64_t b, std::int64_t t, std::int64_t c) const {
  return origin_ + static_cast<std::size_t>((b * batch_stride_ + t * time_stride_ + c) *
                                            static_cast<std::int64_t>(element_));
}

void Tensor::set(const std::vector<double>& values) {
  std::size_t i = 0;
  for (std::int64_t b = 0; b < dims_.batch; ++b) {
    for (std::int64_t t = 0; t < dims_.time; ++t) {
      for (std::int64_t c = 0; c < width_; ++c) {
        for (std::size_t at = 0; at < element_; at += real_bytes(dtype_)) {
          write(bytes_.data() + offset(b, t, c) + at, dtype_, values.at(i++));
        }
      }
    }
  }
}

std::vector<double> Tensor::get() const {
  std::vector<double> values;
  for (std::int64_t b = 0; b < dims_.batch; ++b) {
    for (std::int64_t t = 0; t < dims_.time; ++t) {
      for (std::int64_t c = 0; c < width_; ++c) {
        for (std::size_t at = 0; at < element_; at += real_bytes(dtype_)) {
          values.push_back(read(bytes_.data() + offset(b, t, c) + at, dtype_));
        }
      }
    }
  }
  return values;
}

void Tensor::set(const std::vector<Complex>& values) { set(flatten(values)); }
std::vector<Complex> Tensor::get_complex() const { return pair_up(get()); }

void Tensor::expect_guards_intact(const char* what) const {
  std::vector<bool> inside(bytes_.size());
  for (std::int64_t b = 0; b < dims_.batch; ++b) {
    for (std::int64_t t = 0; t < dims_.time; ++t) {
      const auto at = static_cast<std::ptrdiff_t>(offset(b, t, 0));
      std::fill_n(inside.begin() + at, static_cast<std::size_t>(width_) * element_, true);
    }
  }
  for (std::size_t i = 0; i < bytes_.size(); ++i) {
    if (!inside[i]) {
      ASSERT_EQ(bytes_[i], kGuard) << what << ": byte " << i << " outside was written";
    }
  }
}

void for_drawn_cases(std::uint64_t usual, const std::function<void(Random&, std::uint64_t)>& work) {
  const char* const wanted = std::getenv("GATELOOP_DIFFERENTIAL_CASES");
  const std::uint64_t count = wanted == nullptr ? usual : std::strtoull(wanted, nullptr, 10);
  const auto targets = recurrence::cpu::targets();
  for (std::uint64_t seed = 0; seed < count && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    recurrence::cpu::force_target(
        targets[static_cast<std::size_t>(random.integer(0, std::ssize(targets) - 1))]);
    work(random, seed);
  }
  recurrence::cpu::force_target("");
}

std::uint32_t float_mode() {
#if defined(__SSE2__)
  return _mm_getcsr() & ~0x3Fu;  // without the flags of what has happened
#else
  return 0;
#endif
}

recurrence::Executor threads(int count) {
  if (count == 1) return {};
  return {count, [](std::int64_t n, const std::function<void(std::int64_t)>& body) {
            std::vector<std::thread> pool;
            for (std::int64_t i = 0; i < n; ++i) {
              pool.emplace_back([&body, i] {
                const std::uint32_t mode = float_mode();
                body(i);
                EXPECT_EQ(float_mode(), mode);
              });
            }
            for (std::thread& thread : pool) thread.join();
          }};
}

Scratch::Scratch(std::size_t bytes)
    : data_(bytes == 0 ? nullptr : ::operator new (bytes, std::align_val_t{64})) {
  if (bytes != 0) std::memset(data_, 0xFF, bytes);  // floats that are no numbers
}
Scratch::~Scratch() { ::operator delete (data_, std::align_val_t{64}); }

std::vector<double> Random::uniform(std::size_t n, double low, double high) {
  std::vector<double> out(n);
  for (double& x : out) x = uniform(low, high);
  return out;
}

std::vector<double> Random::normal(std::size_t n, double deviation) {
  std::normal_distribution<double> distribution(0, deviation);
  std::vector<double> out(n);
  for (double& x : out) x = distribution(engine_);
  return out;
}

std::vector<Complex> Random::complex_normal(std::size_t n, double deviation) {
  return pair_up(normal(2 * n, deviation));
}

std::vector<Complex> Random::ring(std::size_t n, double low, double high) {
  std::vector<Complex> out(n);
  for (Complex& x : out) x = std::polar(uniform(low, high), uniform(-3.14159265, 3.14159265));
  return out;
}

Tolerance tolerance(DType dtype, std::int64_t steps) {
  const double rounding = half_ulp(accumulation(dtype));
  const double stored = accumulation(dtype) == dtype ? 0 : half_ulp(dtype);
  return {8 * rounding * std::sqrt(static_cast<double>(steps) + 4), stored, subnormal_loss(dtype),
          dtype == DType::kFloat16 ? 65504 : INFINITY};
}

::testing::AssertionResult near(const std::vector<double>& actual,
                                const std::vector<double>& expected,
                                const std::vector<double>& scales, Tolerance tolerance, int parts) {
  if (actual.size() != expected.size()) {
    return ::testing::AssertionFailure() << actual.size() << " of " << expected.size() << " values";
  }
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double scale = scales[i / static_cast<std::size_t>(parts) % scales.size()];
    const double allowed =
        tolerance.scaled * scale + tolerance.relative * std::fabs(expected[i]) + tolerance.absolute;
    const bool overflows = std::isinf(actual[i]) && actual[i] * expected[i] > 0 &&
                           std::fabs(expected[i]) + allowed >= tolerance.largest;
    if (!overflows && !(std::fabs(actual[i] - expected[i]) <= allowed)) {
      return ::testing::AssertionFailure() << "[" << i << "] is " << actual[i] << ", should be "
                                           << expected[i] << " within " << allowed;
    }
  }
  return ::testing::AssertionSuccess();
}

std::vector<double> scales(const std::vector<double>& magnitudes, std::int64_t channels) {
  std::vector<double> out(static_cast<std::size_t>(channels));
  for (std::size_t i = 0; i < magnitudes.size(); ++i) {
    double& scale = out[i % out.size()];
    scale = std::max(scale, magnitudes[i]);
  }
  return out;
}

void expect_near(const std::vector<double>& actual, const std::vector<double>& expected,
                 const std::vector<double>& scales, Tolerance tolerance, const std::string& what) {
  ASSERT_TRUE(near(actual, expected, scales, tolerance)) << what;
}

void expect_near(const std::vector<Complex>& actual, const std::vector<Complex>& expected,
                 const std::vector<double>& scales, Tolerance tolerance, const std::string& what) {
  ASSERT_TRUE(near(flatten(actual), flatten(expected), scales, tolerance, 2)) << what;
}

void expect_no_subnormals(const std::vector<double>& values) {
#if defined(__SSE2__) || defined(__aarch64__)
  for (const double x : values) EXPECT_TRUE(x == 0 || std::fabs(x) >= 0x1p-126) << x;
#endif
}

std::vector<double> flatten(const std::vector<Complex>& pairs) {
  std::vector<double> out;
  out.reserve(2 * pairs.size());
  for (const Complex& x : pairs) out.insert(out.end(), {x.real(), x.imag()});
  return out;
}

std::vector<Complex> pair_up(const std::vector<double>& reals) {
  std::vector<Complex> out;
  out.reserve(reals.size() / 2);
  for (std::size_t i = 0; i + 1 < reals.size(); i += 2) out.emplace_back(reals[i], reals[i + 1]);
  return out;
}

std::string describe(DType dtype, const Dims& n, bool reverse, Layout layout) {
  return name(dtype) + " (" + std::to_string(n.batch) + ", " + std::to_string(n.time) + ", " +
         std::to_string(n.channels) + ")" + (reverse ? " reverse" : "") + " layout " +
         std::to_string(static_cast<int>(layout));
}

std::vector<Dims> covering_shapes() {
  // Every length with two widths and every width with two lengths at least.
  std::vector<Dims> shapes = {{0, 5, 8},   {1, 0, 7},  {3, 0, 64}, {3, 5, 0},    {1, 1, 1},
                              {1, 1, 257}, {3, 2, 3},  {1, 2, 17}, {1, 3, 100},  {3, 3, 7},
                              {3, 5, 15},  {1, 5, 16}, {1, 63, 8}, {3, 63, 17},  {1, 64, 64},
                              {1, 64, 1},  {1, 65, 7}, {3, 65, 3}, {1, 127, 16}, {1, 127, 15},
                              {1, 15, 17}, {3, 16, 8}, {1, 17, 3}, {3, 32, 1}};
  if (!kSanitized) {
    shapes.insert(shapes.end(), {{1, 65, 257},
                                 {3, 127, 100},
                                 {1, 257, 8},
                                 {3, 257, 17},
                                 {1, 1031, 1},
                                 {1, 1031, 64},
                                 {3, 1031, 3},
                                 {1, 257, 100}});
  } else {
    shapes.insert(shapes.end(), {{1, 257, 8}, {1, 1031, 3}});
  }
  return shapes;
}

}  // namespace gateloop::testing
