#include <algorithm>
#include <cmath>

#include "linear_recurrence_case.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/subnormals.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing::linear {
namespace {

TEST(LinearRecurrence, MatchesTheOracle) {
  for (const DType dtype : kDTypes) {
    for (const Dims& dims : covering_shapes()) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype, .dims = dims, .reverse = reverse});
      }
    }
  }
}

TEST(LinearRecurrence, AnyLayout) {
  for (const DType dtype : kDTypes) {
    for (const Layout layout : kLayouts) {
      for (const bool reverse : {false, true}) {
        check({.dtype = dtype, .dims = {3, 67, 37}, .reverse = reverse, .layout = layout});
      }
    }
    check({.dtype = dtype, .dims = {2, 67, 37}, .broadcast = true});
    check({.dtype = dtype, .dims = {2, 67, 37}, .states = false});
  }
}

TEST(LinearRecurrence, EveryTarget) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    ASSERT_EQ(recurrence::cpu::active_target(), target);
    for (const DType dtype : kDTypes) check({.dtype = dtype, .dims = {2, 66, 47}});
  }
  recurrence::cpu::force_target("");
}

// (1, 9000, 5) is parallel in time, (2, 130, 600) in channels, (7, 66, 33) in the batch.
TEST(LinearRecurrence, SameBitsForAnyThreads) {
  for (const DType dtype : {DType::kFloat32, DType::kComplex128, DType::kBFloat16}) {
    for (const Dims dims : {Dims{1, 9000, 5}, Dims{2, 130, 600}, Dims{7, 66, 333}}) {
      Case c{.dtype = dtype, .dims = dims};
      const Outcome one = run(c);
      for (const int threads : {1, 2, 3, 5, 16}) {
        c.threads = threads;
        expect_same(one, run(c), describe(c) + " threads " + std::to_string(threads));
      }
    }
  }
}

// Rows of several vectors and a tail, too wide to be cut in time.
TEST(LinearRecurrence, WideRows) {
  for (const DType dtype : kDTypes) {
    check({.dtype = dtype, .dims = {1, 515, 101}, .threads = 2});
    check({.dtype = dtype, .dims = {2, 512, 37}, .reverse = true, .threads = 3});
  }
}

// Tiles of one row pass from thread to thread, block by block.
TEST(LinearRecurrence, SameBitsPipelined) {
  for (const DType dtype : {DType::kFloat32, DType::kComplex128, DType::kBFloat16}) {
    expect_same_pipelined(Case{.dtype = dtype, .dims = {1, 1600, 600}});
  }
  check({.dtype = DType::kComplex128, .dims = {1, 4096, 511}, .threads = 2});
}

TEST(LinearRecurrence, ParallelInTime) {
  for (const DType dtype : kDTypes) {
    for (const bool reverse : {false, true}) {
      check({.dtype = dtype, .dims = {1, 4096, 3}, .reverse = reverse, .threads = 2});
      check({.dtype = dtype, .dims = {2, 5003, 1}, .reverse = reverse, .threads = 3});
    }
  }
  // Many blocks.
  check({.dtype = DType::kFloat32, .dims = {1, 70001, 2}, .threads = 2});
}

// Stores past the cache, where rows are aligned (128 channels) and where they are not.
TEST(LinearRecurrence, SameBitsPastTheCache) {
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kDTypes) {
      for (const Dims dims : {Dims{2, 67, 128}, Dims{1, 5, 21}}) {
        for (const Layout layout : kLayouts) {
          const Case c{.dtype = dtype, .dims = dims, .layout = layout, .threads = 2};
          const Outcome cached = run(c);
          recurrence::cpu::set_stream_bytes(0);
          expect_same(cached, run(c), target + " " + describe(c));
          recurrence::cpu::set_stream_bytes(recurrence::cpu::kStreamBytes);
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(LinearRecurrence, ReverseIsFlipScanFlip) {
  for (const DType dtype : kDTypes) {
    const Dims dims{1, 70, 9};
    // The negative layout stores step 0 last: read forward in memory it is the flipped sequence.
    Case c{.dtype = dtype, .dims = dims, .reverse = true};
    const Outcome reversed = run(c);
    Tensor a(dtype, dims), x(dtype, dims), h(dtype, dims);
    const auto flip = [&](Array<Complex> v) {
      const auto row = dims.channels;
      for (std::int64_t t = 0; t < dims.time / 2; ++t) {
        std::swap_ranges(v.begin() + t * row, v.begin() + (t + 1) * row,
                         v.begin() + (dims.time - 1 - t) * row);
      }
      return v;
    };
    fill(a, dtype, flip(reversed.a));
    fill(x, dtype, flip(reversed.x));
    StateTensor initial(dtype, dims);
    fill(initial, dtype, reversed.initial);
    execute(
        recurrence::LinearRecurrence{
            dtype, {1, 70, 9}, false, a.in(), x.in(), initial.data(), h.out(), nullptr},
        1);
    expect_same_bits(flip(get(h, dtype)), reversed.h, describe(c));
  }
}

TEST(LinearRecurrence, AScanOfAConcatenationIsTwoScansWithTheStateCarried) {
  for (const DType dtype : kDTypes) {
    const Dims dims{2, 131, 19};
    const Outcome whole = run({.dtype = dtype, .dims = dims});
    Tensor a(dtype, dims), x(dtype, dims), h(dtype, dims);
    StateTensor initial(dtype, dims), middle(dtype, dims), last(dtype, dims);
    fill(a, dtype, whole.a);
    fill(x, dtype, whole.x);
    fill(initial, dtype, whole.initial);
    for (const std::int64_t cut : {0, 1, 4, 63, 64, 130, 131}) {
      const auto from = [&](Tensor& t, std::int64_t step) {
        const std::int64_t bytes = (dtype == DType::kFloat32                                ? 4
                                    : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2
                                    : dtype == DType::kComplex128                           ? 16
                                                                                            : 8);
        recurrence::Sequence s = t.out();
        s.data = static_cast<std::byte*>(s.data) + step * s.time_stride * bytes;
        return s;
      };
      const auto part = [&](std::int64_t begin, std::int64_t end, StateTensor& in,
                            StateTensor& out) {
        const auto as = from(a, begin), xs = from(x, begin);
        execute(recurrence::LinearRecurrence{dtype,
                                             {dims.batch, end - begin, dims.channels},
                                             false,
                                             {as.data, as.batch_stride, as.time_stride},
                                             {xs.data, xs.batch_stride, xs.time_stride},
                                             in.data(),
                                             from(h, begin),
                                             out.data()},
                1);
      };
      part(0, cut, initial, middle);
      part(cut, dims.time, middle, last);
      expect_same_bits(get(h, dtype), whole.h, "h cut at " + std::to_string(cut));
      expect_same_bits(get(last, dtype), whole.final_state, "final");
    }
  }
}

// After a transition of 0 nothing before it counts, infinity aside.
TEST(LinearRecurrence, ZeroTransitionsRestartTheState) {
  const Dims dims{1, 7, 21};
  Tensor a(DType::kFloat32, dims), x(DType::kFloat32, dims), h(DType::kFloat32, dims);
  a.set(Array<double>(elements(dims), 0.0));
  x.set(Random(1).normal(elements(dims)));
  execute(
      recurrence::LinearRecurrence{
          DType::kFloat32, {1, 7, 21}, false, a.in(), x.in(), nullptr, h.out(), nullptr},
      1);
  expect_same_bits(h.get(), x.get(), "h");
}

// The state of a sound of 8 steps falls below the normal numbers, and back again the gradient.
TEST(LinearRecurrence, DecaysToSilence) {
  for (const DType dtype : {DType::kFloat32, DType::kComplex64, DType::kBFloat16}) {
    // The second is parallel in time.
    for (const Dims dims : {Dims{1, 300, 37}, Dims{1, 4096, 3}}) {
      for (const bool reverse : {false, true}) {
        const Case c{.dtype = dtype, .dims = dims, .reverse = reverse, .sound = 8, .threads = 2};
        Random random(9);
        Array<Complex> a = random.ring(elements(dims), 0.1, 0.6);
        if (!is_complex(dtype))
          std::ranges::transform(a, a.begin(), [](Complex x) { return std::abs(x); });
        const Outcome out = run_on(c, a);
        check(c, out);
        for (const auto* values : {&out.h, &out.final_state, &out.da, &out.dx, &out.dinitial}) {
          expect_no_subnormals(flatten(*values));
        }
        const recurrence::cpu::FlushSubnormals mode_of_caller;
        expect_same(out, run_on(c, a), "where the caller flushes too");
      }
    }
  }
}

// With a = 1 and x = 0 the stored h is the float32 initial state, rounded once.
TEST(LinearRecurrence, SixteenBitStoresRoundToNearestEven) {
  const Array<double> values = {1 + 0x1p-8,    1 + 3 * 0x1p-8,  1 + 0x1p-8 + 0x1p-20,
                                1 + 0x1p-11,   1 + 3 * 0x1p-11, -1 - 0x1p-8,
                                65519,         65520,           -65536,
                                3.0e38,        0x1p-24,         0x1p-25,
                                1.5 * 0x1p-24, 0x1p-15,         1.0 / 3,
                                -0.0,          INFINITY,        -INFINITY,
                                NAN,           0x1.fffp-15,     0x1p-126,
                                -1e-30,        0x1.fep127,      0x1.ffp127};
  const Dims dims{1, 1, static_cast<std::int64_t>(values.size())};
  for (const std::string& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      Tensor a(dtype, dims), x(dtype, dims), h(dtype, dims), expected(dtype, dims);
      StateTensor initial(dtype, dims);
      a.set(Array<double>(values.size(), 1.0));
      x.set(Array<double>(values.size(), -0.0));  // -0 + -0 = -0
      initial.set(values);
      expected.set(initial.get());
      execute(recurrence::LinearRecurrence{dtype,
                                           {1, 1, dims.channels},
                                           false,
                                           a.in(),
                                           x.in(),
                                           initial.data(),
                                           h.out(),
                                           nullptr},
              1);
      const auto got = h.get(), want = expected.get();
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (std::isnan(want[i])) {
          EXPECT_TRUE(std::isnan(got[i])) << target << " " << name(dtype);
        } else {
          EXPECT_EQ(got[i], want[i]) << target << " " << name(dtype) << " of " << values[i];
          EXPECT_EQ(std::signbit(got[i]), std::signbit(want[i])) << target << " " << values[i];
        }
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(LinearRecurrence, RejectsWhatItDoesNotTake) {
  recurrence::LinearRecurrence p;
  p.dtype = static_cast<DType>(17);
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.dtype = DType::kFloat32;
  p.shape.time = -1;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::testing::linear
