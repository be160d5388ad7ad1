#pragma once

/// Sequences in every storage type and memory layout, guarded on all sides; threads; comparisons.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "gateloop/recurrence.h"
#include "oracle.h"

namespace gateloop::testing {

using oracle::Array;
using oracle::Complex;
using oracle::Dims;
using recurrence::DType;

inline constexpr DType kRealDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                        DType::kFloat16};

/// Under a sanitizer everything is some 10 times slower: fewer, not other, cases.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(GATELOOP_SANITIZED)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

std::string name(DType);
DType accumulation(DType);  // the type of its states
bool is_complex(DType);
/// Largest relative error of rounding to this type once.
double half_ulp(DType);
/// What a number too small to be normal loses at most: float16 rounds it, the others flush it. A
/// complex product flushes up to four.
double subnormal_loss(DType);

/// How a (B, T, D) sequence lies in memory.
enum class Layout {
  kContiguous,
  kMisaligned,  // one element past a 64-byte boundary
  kProjection,  // the second third of rows of 3D: q, k, v out of one projection
  kNegative,    // time and batch run down through memory
  kBroadcast,   // one row for all steps and batches (inputs only)
};
inline constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kMisaligned, Layout::kProjection,
                                      Layout::kNegative};

/// A sequence of `dtype` whose surroundings hold a pattern that must stay as it is.
class Tensor {
 public:
  /// `parts`: numbers of `dtype` per channel (2 for z).
  Tensor(DType dtype, Dims dims, Layout layout = Layout::kContiguous, std::int64_t parts = 1);

  /// Rounds to dtype, to nearest even.
  void set(const std::vector<double>& values);
  std::vector<double> get() const;  // (B, T, D parts), exact
  void set(const std::vector<Complex>& values);
  std::vector<Complex> get_complex() const;
  /// Fails the test if a byte outside the sequence has changed.
  void expect_guards_intact(const char* what) const;

  recurrence::ConstSequence in() const { return {data(), batch_stride_, time_stride_}; }
  recurrence::Sequence out() { return {data(), batch_stride_, time_stride_}; }
  void* data() const { return const_cast<std::byte*>(bytes_.data()) + origin_; }

 private:
  std::size_t offset(std::int64_t b, std::int64_t t, std::int64_t c) const;

  DType dtype_;
  Dims dims_;                                        // channels in reals of storage
  std::int64_t width_, batch_stride_, time_stride_;  // strides in elements of dtype
  std::size_t element_, origin_;
  std::vector<std::byte> bytes_;
};

/// A (B, D) state, as a sequence of one step.
class StateTensor : public Tensor {
 public:
  StateTensor(DType dtype, Dims dims, std::int64_t parts = 1)
      : Tensor(accumulation(dtype), {dims.batch, 1, dims.channels}, Layout::kContiguous, parts) {}
};

/// How this thread rounds and flushes; 0 where that cannot be read.
std::uint32_t float_mode();

/// Fresh std::threads for every parallel_for, so that thread sanitizer observes real ones. Fails
/// the test where a thread's float_mode() has changed.
recurrence::Executor threads(int count);

/// 64-byte aligned bytes of exactly the size given, so that address sanitizer guards their end.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

/// Where set, runs an operation in place of the CPU kernels: the cases test other kernels too.
template <class Params>
inline std::function<void(const Params&)> replacement;

template <class Params>
void execute(const Params& params, int thread_count) {
  if (replacement<Params>) return replacement<Params>(params);
  const Scratch scratch(recurrence::scratch_bytes(params, thread_count));
  const std::uint32_t mode = float_mode();
  recurrence::run(params, threads(thread_count), scratch.get());
  EXPECT_EQ(float_mode(), mode);
}

/// Of an operation on rows.
template <class Params>
void expect_refusals() {
  Params p;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.dtype = DType::kFloat32;
  p.rows = -1;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(engine_);
  }
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  std::vector<double> uniform(std::size_t n, double low, double high);
  std::vector<double> normal(std::size_t n, double deviation = 1);
  std::vector<Complex> complex_normal(std::size_t n, double deviation = 1);
  /// Of modulus in [low, high], any angle.
  std::vector<Complex> ring(std::size_t n, double low, double high);

 private:
  std::mt19937_64 engine_;
};

/// work(random, seed) for `usual` seeds, or as many as `make fuzz` sets, on a target that is drawn.
/// Ends with the first seed that fails.
void for_drawn_cases(std::uint64_t usual,
                     const std::function<void(Random& random, std::uint64_t seed)>& work);

/// |actual - expected| <= scaled * scale + relative * |expected| + absolute, element by element.
/// Beyond the largest number that its type stores an element may be infinite.
struct Tolerance {
  double scaled, relative, absolute = 0, largest = INFINITY;
};
/// Of a value computed by `steps` steps of recurrence in the accumulation type of `dtype` and then
/// stored. Every step rounds a few times at half an ulp of the running value. As |a| <= 1, no error
/// grows; errors of random sign add up as the square root of the steps. 8 covers the tail of the
/// distribution over all elements and the handful of roundings per step. `absolute`: what numbers
/// too small to be normal lose.
Tolerance tolerance(DType dtype, std::int64_t steps);

/// Of rows of as many channels as `scales` has, complex numbers in pairs. The scale of an element
/// is that of its channel: a large channel does not hide errors of a small one.
::testing::AssertionResult near(const std::vector<double>& actual,
                                const std::vector<double>& expected,
                                const std::vector<double>& scales, Tolerance tolerance,
                                int parts = 1);
/// Of each channel the largest of its magnitudes, see the oracle.
std::vector<double> scales(const std::vector<double>& magnitudes, std::int64_t channels);

void expect_near(const std::vector<double>& actual, const std::vector<double>& expected,
                 const std::vector<double>& scales, Tolerance tolerance, const std::string& what);
void expect_near(const std::vector<Complex>& actual, const std::vector<Complex>& expected,
                 const std::vector<double>& scales, Tolerance tolerance, const std::string& what);
/// All elements of one scale, the largest expected one.
template <class N>
void expect_near(const std::vector<N>& actual, const std::vector<N>& expected, Tolerance tolerance,
                 const std::string& what) {
  double largest = 0;
  for (const N& x : expected) largest = std::max(largest, std::abs(x));
  expect_near(actual, expected, {largest}, tolerance, what);
}
/// One row of tiles that pass from thread to thread, in both directions: with 2 and 3 threads the
/// results of one. Of a case with run(), expect_same() and describe().
template <class Case>
void expect_same_pipelined(const Case& given) {
  for (const bool reverse : {false, true}) {
    Case c = given;
    c.reverse = reverse;
    const auto one = run(c);
    c.threads = reverse ? 3 : 2;
    expect_same(one, run(c), describe(c));
  }
}

template <class N>
void expect_same_bits(const std::vector<N>& a, const std::vector<N>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  EXPECT_EQ(a.empty() ? 0 : std::memcmp(a.data(), b.data(), a.size() * sizeof(N)), 0) << what;
}

/// Makes the channels differ in size, by up to 2^16.
template <class N>
std::vector<N> unequal_channels(std::vector<N> values, std::int64_t channels) {
  constexpr double kSizes[] = {1, 0x1p-8, 0x1p-16};
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] *= kSizes[i % static_cast<std::size_t>(channels) % std::size(kSizes)];
  }
  return values;
}

/// Zeros the values (B, T, D) after the first `steps` steps; all stay if it is negative.
template <class N>
std::vector<N> first_steps(std::vector<N> values, const Dims& dims, std::int64_t steps) {
  if (steps < 0) return values;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (static_cast<std::int64_t>(i) / dims.channels % dims.time >= steps) values[i] = 0;
  }
  return values;
}

/// Of float32 or a shorter type, on the processors where kernels flush subnormal numbers.
void expect_no_subnormals(const std::vector<double>& values);

std::vector<double> flatten(const std::vector<Complex>& pairs);
std::vector<Complex> pair_up(const std::vector<double>& reals);

inline std::size_t elements(const Dims& n) {
  return static_cast<std::size_t>(n.batch * n.time * n.channels);
}
inline std::size_t states(const Dims& n) { return static_cast<std::size_t>(n.batch * n.channels); }
std::string describe(DType dtype, const Dims& dims, bool reverse, Layout layout);

/// Lengths around the block of saved states and primes, widths around every vector size.
std::vector<Dims> covering_shapes();

}  // namespace gateloop::testing
