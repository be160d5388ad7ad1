// The scans as the CUDA kernels compute them, on the CPU, against the oracle.
#include <cmath>
#include <string>

#include "kernels.h"

namespace gateloop::testing::cuda {
namespace {

template <class Op>
class CudaScan : public ::testing::Test {};
using Operations = ::testing::Types<Linear, Polar, Simple>;
TYPED_TEST_SUITE(CudaScan, Operations);

template <class Op>
typename Op::Case case_of(DType dtype, Dims dims, bool reverse = false,
                          Layout layout = Layout::kContiguous) {
  typename Op::Case c{};
  c.dtype = dtype;
  c.dims = dims;
  c.reverse = reverse;
  c.layout = layout;
  return c;
}

// Lengths around chunks of 32, 64 and 128 steps, 0 and 1, primes; widths around tiles of 32 and 64.
TYPED_TEST(CudaScan, MatchesTheOracle) {
  const Kernels<TypeParam> kernels({.shuffle_threads = true});
  auto shapes = covering_shapes();
  for (const std::int64_t time : {31, 33, 128, 129, 255, 256}) shapes.push_back({2, time, 33});
  for (const DType dtype : TypeParam::kDTypes) {
    for (const Dims& dims : shapes) {
      for (const bool reverse : {false, true}) {
        TypeParam::check(case_of<TypeParam>(dtype, dims, reverse));
      }
    }
  }
}

// Where channels are even rows are read in pairs, elsewhere one by one.
TYPED_TEST(CudaScan, AnyLayout) {
  const Kernels<TypeParam> kernels({.resident = 4});
  for (const DType dtype : TypeParam::kDTypes) {
    for (const std::int64_t channels : {37, 38, 64}) {
      for (const Layout layout : kLayouts) {
        for (const bool reverse : {false, true}) {
          TypeParam::check(case_of<TypeParam>(dtype, {3, 167, channels}, reverse, layout));
        }
      }
    }
    auto c = case_of<TypeParam>(dtype, {2, 167, 37});
    c.states = false;
    TypeParam::check(c);
  }
}

// Blocks begin in any order, at most `resident` at a time, and take turns after every phase.
TYPED_TEST(CudaScan, SameBitsInAnyOrder) {
  const Order orders[] = {{.resident = 2, .seed = 2},
                          {.resident = 5, .newest = 90, .seed = 3},
                          {.resident = 1000, .shuffle_threads = true, .seed = 4},
                          {.resident = 1000, .newest = 95, .seed = 5}};
  for (const DType dtype : TypeParam::kDTypes) {
    for (const bool reverse : {false, true}) {
      for (const Dims dims : {Dims{1, 1031, 5}, Dims{3, 300, 70}}) {
        const auto c = case_of<TypeParam>(dtype, dims, reverse);
        const auto in_turn = [&] {
          const Kernels<TypeParam> kernels({});
          return TypeParam::run(c);
        }();
        for (const Order& order : orders) {
          const Kernels<TypeParam> kernels(order);
          TypeParam::expect_same(in_turn, TypeParam::run(c),
                                 name(dtype) + " order " + std::to_string(order.seed));
        }
      }
    }
  }
}

// More chunks at work than a look-back reads at once.
TYPED_TEST(CudaScan, LooksBackFurtherThanItsWindow) {
  const auto c = case_of<TypeParam>(DType::kFloat32, {1, 128 * 3 * kWindow + 5, 1});
  const auto in_turn = [&] {
    const Kernels<TypeParam> kernels({});
    return TypeParam::run(c);
  }();
  const Kernels<TypeParam> kernels({.resident = 1000, .newest = 50});
  const auto out = TypeParam::run(c);
  TypeParam::expect_same(in_turn, out, "far");
}

// So that a decoding step is one launch.
TYPED_TEST(CudaScan, NeedsNoScratchForOneChunk) {
  typename TypeParam::Forward p;
  p.shape = {3, 1, 70};
  visit(p, [&]<class Tile, class Op>(const Op&) {
    EXPECT_EQ(Tile::kSteps, 1);
    EXPECT_EQ((scratch_of<typename Op::Value, Tile>(schedule_of<Tile>(p)).total), 0u);
  });
  p.shape.time = 32;
  visit(p, [&]<class Tile, class Op>(const Op&) {
    EXPECT_EQ((scratch_of<typename Op::Value, Tile>(schedule_of<Tile>(p)).total), 0u);
  });
}

TYPED_TEST(CudaScan, RefusesWhatItDoesNotTake) {
  const auto refuses = []<class Params>(Params p) {
    const auto ignore = []<class Tile>(const auto&) {};
    p.dtype = static_cast<DType>(17);
    EXPECT_THROW(visit(p, ignore), std::invalid_argument);
    p.dtype = DType::kFloat32;
    p.shape.time = -1;
    EXPECT_THROW(visit(p, ignore), std::invalid_argument);
    p.shape = {2, 5, 3};
    const std::int64_t offsets[] = {0, 5};
    p.offsets = offsets;
    EXPECT_THROW(visit(p, ignore), std::invalid_argument);
  };
  refuses(typename TypeParam::Forward());
  refuses(typename TypeParam::Backward());
}

std::int64_t real_bytes(DType dtype) {
  if (dtype == DType::kFloat64 || dtype == DType::kComplex128) return 8;
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 4;
}

/// Bytes that an operation must read and write, states and saved states included.
struct Least {
  std::int64_t read, written;
};
Least least_of(DType dtype, const Dims& n, const Reals& reals, bool backward, bool complex_state) {
  const std::int64_t parts = is_complex(dtype) ? 2 : 1;
  const std::int64_t element = real_bytes(dtype) * parts;
  const std::int64_t state_real = real_bytes(accumulation(dtype));
  const std::int64_t elements = n.batch * n.time * n.channels;
  const std::int64_t saved =
      n.batch * recurrence::saved_state_count(n.time) * n.channels * reals.saved * state_real;
  const std::int64_t state = n.batch * n.channels * state_real * (complex_state ? 2 : parts);
  return {elements * reals.in * element + state * (backward && reals.saved == 0 ? 2 : 1) +
              (backward ? saved : 0),
          elements * reals.out * element + state + (backward ? 0 : saved)};
}

void expect_one_pass(const Traffic& t, const Least& least, const std::string& what) {
  EXPECT_LE(t.read, least.read) << what << ": inputs are read once";
  EXPECT_EQ(t.written, least.written) << what;
  const auto all = static_cast<double>(t.read + t.written + t.carried);
  const double bytes = all / static_cast<double>(least.read + least.written);
  const double sectors = static_cast<double>(t.sectors) / static_cast<double>(t.least_sectors);
  EXPECT_LE(bytes, 1.1) << what;
  EXPECT_LE(sectors, 1.1) << what;
  std::printf("%-40s bytes %.3f of inputs + outputs, sectors %.3f of the least\n", what.c_str(),
              bytes, sectors);
}

// Contiguous rows of whole cache lines, chunks whole: what training has.
TYPED_TEST(CudaScan, ReadsInputsOnceInWholeSectors) {
  const Dims dims{2, 1024, 128};
  const bool complex_state = std::is_same_v<TypeParam, Polar>;
  for (const DType dtype : TypeParam::kDTypes) {
    Traffic forward, backward;
    {
      const Kernels<TypeParam> kernels({}, &forward, &backward);
      TypeParam::run(case_of<TypeParam>(dtype, dims));
    }
    const std::string what =
        std::string(::testing::UnitTest::GetInstance()->current_test_info()->type_param()) +
        (" " + name(dtype));
    expect_one_pass(forward, least_of(dtype, dims, TypeParam::kForward, false, complex_state),
                    what);
    expect_one_pass(backward, least_of(dtype, dims, TypeParam::kBackward, true, complex_state),
                    what + " backward");
  }
}

}  // namespace
}  // namespace gateloop::testing::cuda
