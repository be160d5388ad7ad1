#include <cmath>

#include "harness.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

constexpr DType kDTypes[] = {DType::kFloat32,    DType::kFloat64,  DType::kComplex64,
                             DType::kComplex128, DType::kBFloat16, DType::kFloat16};

struct Case {
  DType dtype;
  Dims dims;
  bool reverse = false;
  Layout layout = Layout::kContiguous;
  bool states = true;      // initial and final ones given
  bool broadcast = false;  // one row of `a` for all steps
  int threads = 1;
  std::uint64_t seed = 7;
};

std::string describe(const Case& c) { return describe(c.dtype, c.dims, c.reverse, c.layout); }

/// Inputs as stored, outputs as read back; complex numbers throughout, real ones with im = 0.
struct Outcome {
  Array<Complex> a, x, initial, dh, dfinal;
  Array<Complex> h, final_state, da, dx, dinitial;
};

Array<Complex> get(const Tensor& tensor, DType dtype) {
  if (is_complex(dtype)) return tensor.get_complex();
  const auto reals = tensor.get();
  return {reals.begin(), reals.end()};
}

void fill(Tensor& tensor, DType dtype, const Array<Complex>& values) {
  if (is_complex(dtype)) return tensor.set(values);
  Array<double> reals;
  for (const Complex& x : values) reals.push_back(x.real());
  tensor.set(reals);
}

/// |a| in [0.99, 1]: no error can hide by decaying. Real ones keep the modulus as their value.
Array<Complex> transitions(Random& random, const Case& c) {
  const std::size_t n = elements(c.dims);
  if (is_complex(c.dtype)) return random.ring(n, 0.99, 1);
  const auto reals = random.uniform(n, 0.99, 1);
  return {reals.begin(), reals.end()};
}

Outcome run(const Case& c) {
  Random random(c.seed);
  const DType dtype = c.dtype;
  const Dims n = c.dims;
  Tensor a(dtype, n, c.broadcast ? Layout::kBroadcast : c.layout), x(dtype, n, c.layout),
      h(dtype, n, c.layout), dh(dtype, n, c.layout), da(dtype, n, c.layout), dx(dtype, n, c.layout);
  StateTensor initial(dtype, n), final_state(dtype, n), dfinal(dtype, n), dinitial(dtype, n);
  fill(a, dtype, transitions(random, c));
  for (Tensor* t : {&x, &dh}) fill(*t, dtype, random.complex_normal(elements(n)));
  for (Tensor* t : {(Tensor*)&initial, (Tensor*)&dfinal}) {
    fill(*t, dtype, random.complex_normal(states(n)));
  }

  recurrence::LinearRecurrence forward{
      dtype, {n.batch, n.time, n.channels}, c.reverse, a.in(), x.in(), nullptr, h.out(), nullptr};
  if (c.states) {
    forward.initial_state = initial.data();
    forward.final_state = final_state.data();
  }
  execute(forward, c.threads);

  recurrence::LinearRecurrenceBackward backward;
  backward.dtype = dtype;
  backward.shape = forward.shape;
  backward.reverse = c.reverse;
  backward.a = a.in();
  backward.h = h.in();
  backward.dh = dh.in();
  backward.da = da.out();
  backward.dx = dx.out();
  if (c.states) {
    backward.initial_state = initial.data();
    backward.dfinal_state = dfinal.data();
    backward.dinitial_state = dinitial.data();
  }
  execute(backward, c.threads);

  for (const Tensor* t : {&a, &x, &h, &dh, &da, &dx}) t->expect_guards_intact("sequence");
  for (const StateTensor* t : {&initial, &final_state, &dfinal, &dinitial}) {
    t->expect_guards_intact("state");
  }
  Outcome out{get(a, dtype),      get(x, dtype),       get(initial, dtype),     get(dh, dtype),
              get(dfinal, dtype), get(h, dtype),       get(final_state, dtype), get(da, dtype),
              get(dx, dtype),     get(dinitial, dtype)};
  if (!c.states) {
    for (auto* state : {&out.initial, &out.final_state, &out.dfinal, &out.dinitial}) state->clear();
  }
  return out;
}

void check(const Case& c) {
  SCOPED_TRACE(describe(c));
  const Outcome out = run(c);
  const Tolerance close = tolerance(c.dtype, c.dims.time);
  // The state is kept in float32 where the sequences are 16 bits wide.
  const Tolerance close_state = tolerance(accumulation(c.dtype), c.dims.time);
  const auto forward = oracle::linear_recurrence(c.dims, c.reverse, out.a, out.x, out.initial);
  expect_near(out.h, forward.h, close, "h");
  if (c.states) expect_near(out.final_state, forward.final_state, close_state, "final");
  // The adjoint is judged on the h it was given, with its storage rounding.
  const auto backward = oracle::linear_recurrence_backward(c.dims, c.reverse, out.a, out.h,
                                                           out.initial, out.dh, out.dfinal);
  expect_near(out.da, backward.da, close, "da");
  expect_near(out.dx, backward.dx, close, "dx");
  if (c.states) expect_near(out.dinitial, backward.dinitial, close_state, "dinitial");
}

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.h, b.h, what + " h");
  expect_same_bits(a.final_state, b.final_state, what + " final");
  expect_same_bits(a.da, b.da, what + " da");
  expect_same_bits(a.dx, b.dx, what + " dx");
  expect_same_bits(a.dinitial, b.dinitial, what + " dinitial");
}

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
    for (const bool reverse : {false, true}) {
      Case c{.dtype = dtype, .dims = {1, 1600, 600}};
      c.reverse = reverse;
      const Outcome one = run(c);
      c.threads = reverse ? 3 : 2;
      expect_same(one, run(c), describe(c));
    }
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

// A transition of 0 forgets everything before it, infinity aside.
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

// With a = 1 and x = 0 the stored h is the float32 initial state, rounded once.
TEST(LinearRecurrence, SixteenBitStoresRoundToNearestEven) {
  const Array<double> values = {1 + 0x1p-8,    1 + 3 * 0x1p-8,  1 + 0x1p-8 + 0x1p-20,
                                1 + 0x1p-11,   1 + 3 * 0x1p-11, -1 - 0x1p-8,
                                65519,         65520,           -65536,
                                3.0e38,        0x1p-24,         0x1p-25,
                                1.5 * 0x1p-24, 0x1p-15,         1.0 / 3,
                                -0.0,          INFINITY,        -INFINITY,
                                NAN,           0x1.fffp-15,     1e-40,
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
}  // namespace gateloop::testing
