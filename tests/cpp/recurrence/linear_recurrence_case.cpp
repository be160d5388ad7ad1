#include "linear_recurrence_case.h"

namespace gateloop::testing::linear {

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

namespace {

/// |a| in [0.99, 1]: no error can hide by decaying. Real ones keep the modulus as their value.
Array<Complex> transitions(Random& random, const Case& c) {
  const std::size_t n = elements(c.dims);
  if (is_complex(c.dtype)) return random.ring(n, 0.99, 1);
  const auto reals = random.uniform(n, 0.99, 1);
  return {reals.begin(), reals.end()};
}

}  // namespace

std::string describe(const Case& c) { return describe(c.dtype, c.dims, c.reverse, c.layout); }

Outcome run_on(const Case& c, const Array<Complex>& a_values) {
  Random random(c.seed);
  const DType dtype = c.dtype;
  const Dims n = c.dims;
  Tensor a(dtype, n, c.broadcast ? Layout::kBroadcast : c.layout), x(dtype, n, c.layout),
      h(dtype, n, c.layout), dh(dtype, n, c.layout), da(dtype, n, c.layout), dx(dtype, n, c.layout);
  StateTensor initial(dtype, n), final_state(dtype, n), dfinal(dtype, n), dinitial(dtype, n);
  fill(a, dtype, a_values);
  for (Tensor* t : {&x, &dh}) {
    const auto values = unequal_channels(random.complex_normal(elements(n)), n.channels);
    fill(*t, dtype, first_steps(values, n, c.sound));
  }
  for (StateTensor* t : {&initial, &dfinal}) {
    fill(*t, dtype, unequal_channels(random.complex_normal(states(n)), n.channels));
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

Outcome run(const Case& c) {
  Random random(c.seed + 1);
  return run_on(c, transitions(random, c));
}

void check(const Case& c, const Outcome& out) {
  SCOPED_TRACE(describe(c));
  const Tolerance close = tolerance(c.dtype, c.dims.time);
  // The state is kept in float32 where the sequences are 16 bits wide.
  const Tolerance close_state = tolerance(accumulation(c.dtype), c.dims.time);
  const auto forward = oracle::linear_recurrence(c.dims, c.reverse, out.a, out.x, out.initial);
  const auto size =
      oracle::linear_magnitudes(c.dims, c.reverse, out.a, out.x, out.initial, out.dh, out.dfinal);
  const auto of = [&](const Array<double>& magnitudes) {
    return scales(magnitudes, c.dims.channels);
  };
  expect_near(out.h, forward.h, of(size.h), close, "h");
  if (c.states) {
    expect_near(out.final_state, forward.final_state, of(size.states), close_state, "final");
  }
  // The adjoint is judged on the h it was given, with its storage rounding.
  const auto backward = oracle::linear_recurrence_backward(c.dims, c.reverse, out.a, out.h,
                                                           out.initial, out.dh, out.dfinal);
  expect_near(out.da, backward.da, of(size.da), close, "da");
  expect_near(out.dx, backward.dx, of(size.dx), close, "dx");
  if (c.states) {
    expect_near(out.dinitial, backward.dinitial, of(size.dinitial), close_state, "dinitial");
  }
}
void check(const Case& c) { check(c, run(c)); }

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.h, b.h, what + " h");
  expect_same_bits(a.final_state, b.final_state, what + " final");
  expect_same_bits(a.da, b.da, what + " da");
  expect_same_bits(a.dx, b.dx, what + " dx");
  expect_same_bits(a.dinitial, b.dinitial, what + " dinitial");
}

}  // namespace gateloop::testing::linear
