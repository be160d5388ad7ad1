#include "polar_gate_loop_case.h"

namespace gateloop::testing::polar {

using recurrence::kSavedStateBlock;
using recurrence::saved_state_count;
Array<Complex> gates(Random& random, std::size_t n) {
  Array<Complex> z = random.ring(n, 4.6, 8);
  const Array<Complex> near = random.complex_normal(n);
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 2 == 0) z[i] = near[i];
    if (i % 97 == 5) z[i] = 0;
  }
  return z;
}

std::string describe(const Case& c) { return describe(c.dtype, c.dims, c.reverse, c.layout); }

Outcome run_on(const Case& c, const Array<Complex>& z_values) {
  Random random(c.seed);
  const DType dtype = c.dtype;
  const Dims n = c.dims;
  Tensor q(dtype, n, c.layout), k(dtype, n, c.layout), v(dtype, n, c.layout),
      z(dtype, n, c.layout, 2), y(dtype, n, c.layout), dy(dtype, n, c.layout),
      dq(dtype, n, c.layout), dk(dtype, n, c.layout), dv(dtype, n, c.layout),
      dz(dtype, n, c.layout, 2);
  StateTensor initial(dtype, n, 2), final_state(dtype, n, 2), dfinal(dtype, n, 2),
      dinitial(dtype, n, 2);
  Tensor saved_states(accumulation(dtype), {n.batch, saved_state_count(n.time), n.channels},
                      Layout::kContiguous, 2);
  for (Tensor* t : {&q, &v}) t->set(random.normal(elements(n)));
  dy.set(first_steps(random.normal(elements(n)), n, c.sound));
  k.set(first_steps(unequal_channels(random.normal(elements(n)), n.channels), n, c.sound));
  z.set(z_values);
  initial.set(unequal_channels(random.complex_normal(states(n)), n.channels));
  dfinal.set(random.complex_normal(states(n)));

  recurrence::PolarGateLoop forward;
  forward.dtype = dtype;
  forward.shape = {n.batch, n.time, n.channels};
  forward.reverse = c.reverse;
  forward.q = q.in();
  forward.k = k.in();
  forward.v = v.in();
  forward.z = z.in();
  forward.y = y.out();
  forward.saved_states = saved_states.data();
  if (c.states) {
    forward.initial_state = initial.data();
    forward.final_state = final_state.data();
  }
  execute(forward, c.threads);

  recurrence::PolarGateLoopBackward backward;
  backward.dtype = dtype;
  backward.shape = forward.shape;
  backward.reverse = c.reverse;
  backward.q = q.in();
  backward.k = k.in();
  backward.v = v.in();
  backward.z = z.in();
  if (c.gradient) backward.dy = dy.in();
  backward.saved_states = saved_states.data();
  backward.dq = dq.out();
  backward.dk = dk.out();
  backward.dv = dv.out();
  backward.dz = dz.out();
  if (c.states) {
    backward.dfinal_state = dfinal.data();
    backward.dinitial_state = dinitial.data();
  }
  execute(backward, c.threads);

  for (const Tensor* t : {&q, &k, &v, &z, &y, &dy, &dq, &dk, &dv, &dz, &saved_states}) {
    t->expect_guards_intact("sequence");
  }
  for (const StateTensor* t : {&initial, &final_state, &dfinal, &dinitial}) {
    t->expect_guards_intact("state");
  }
  Outcome out;
  out.in = {q.get(), k.get(), v.get(), z.get_complex(), {}};
  out.y = y.get();
  out.dq = dq.get();
  out.dk = dk.get();
  out.dv = dv.get();
  out.dz = dz.get_complex();
  out.saved_states = saved_states.get_complex();
  if (c.gradient) out.dy = dy.get();
  if (c.states) {
    out.in.initial_state = initial.get_complex();
    out.final_state = final_state.get_complex();
    out.dfinal = dfinal.get_complex();
    out.dinitial = dinitial.get_complex();
  }
  return out;
}

Outcome run(const Case& c) {
  Random random(c.seed + 1);
  return run_on(c, gates(random, elements(c.dims)));
}

void check(const Case& c, const Outcome& out) {
  SCOPED_TRACE(describe(c));
  const Tolerance close = tolerance(c.dtype, c.dims.time);
  const Tolerance close_state = tolerance(accumulation(c.dtype), c.dims.time);
  const auto forward = oracle::polar_gate_loop(c.dims, c.reverse, out.in);
  const auto size =
      oracle::polar_gate_loop_magnitudes(c.dims, c.reverse, out.in, out.dy, out.dfinal);
  const auto of = [&](const Array<double>& magnitudes) {
    return scales(magnitudes, c.dims.channels);
  };
  expect_near(out.y, forward.y, of(size.y), close, "y");
  if (c.states)
    expect_near(out.final_state, forward.final_state, of(size.states), close_state, "final");

  Array<Complex> saved;
  for (std::int64_t b = 0; b < c.dims.batch; ++b) {
    for (std::int64_t s = 0; s < c.dims.time; s += kSavedStateBlock) {
      const std::int64_t t = c.reverse ? c.dims.time - 1 - s : s;
      const auto row = forward.states.begin() + (b * c.dims.time + t) * c.dims.channels;
      saved.insert(saved.end(), row, row + c.dims.channels);
    }
  }
  expect_near(out.saved_states, saved, of(size.states), close_state, "saved_states");

  const auto backward =
      oracle::polar_gate_loop_backward(c.dims, c.reverse, out.in, out.dy, out.dfinal);
  expect_near(out.dq, backward.dq, of(size.dq), close, "dq");
  expect_near(out.dk, backward.dk, of(size.dk), close, "dk");
  expect_near(out.dv, backward.dv, of(size.dv), close, "dv");
  expect_near(out.dz, backward.dz, of(size.dz), close, "dz");
  if (c.states)
    expect_near(out.dinitial, backward.dinitial, of(size.dinitial), close_state, "dinitial");
}
void check(const Case& c) { check(c, run(c)); }

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.y, b.y, what + " y");
  expect_same_bits(a.final_state, b.final_state, what + " final");
  expect_same_bits(a.saved_states, b.saved_states, what + " saved_states");
  expect_same_bits(a.dq, b.dq, what + " dq");
  expect_same_bits(a.dk, b.dk, what + " dk");
  expect_same_bits(a.dv, b.dv, what + " dv");
  expect_same_bits(a.dz, b.dz, what + " dz");
  expect_same_bits(a.dinitial, b.dinitial, what + " dinitial");
}

}  // namespace gateloop::testing::polar
