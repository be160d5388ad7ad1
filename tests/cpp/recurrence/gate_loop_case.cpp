#include "gate_loop_case.h"

#include <cmath>

namespace gateloop::testing::gate_loop {

using recurrence::FeatureMap;
using recurrence::gate_loop_chunks;

namespace {

DType state_type(const Case& c) {
  const DType real = accumulation(c.dtype);
  if (!c.complex) return real;
  return real == DType::kFloat64 ? DType::kComplex128 : DType::kComplex64;
}

recurrence::ConstHeads heads(const Tensor& t, std::int64_t channels) {
  const auto sequence = t.in();
  return {sequence.data, sequence.batch_stride, sequence.time_stride, channels};
}
recurrence::Heads heads(Tensor& t, std::int64_t channels) {
  const auto sequence = t.out();
  return {sequence.data, sequence.batch_stride, sequence.time_stride, channels};
}

Array<Complex> complex_of(const Case& c, const Tensor& t) {
  if (c.complex) return t.get_complex();
  const std::vector<double> reals = t.get();
  return {reals.begin(), reals.end()};
}
std::int64_t state_keys(const Case& c) {
  return recurrence::feature_count(c.feature_map, c.dims.keys);
}
/// The case as the oracle computes it, which has no feature map.
HeadDims oracle_dims(const Case& c) {
  HeadDims dims = c.dims;
  dims.keys = state_keys(c);
  return dims;
}

/// f(index, row) for each row of q or k.
template <class F>
void for_each_row(const Case& c, const Array<double>& x, const F& f) {
  const auto channels = static_cast<std::size_t>(c.dims.keys);
  const auto rows = static_cast<std::size_t>(c.dims.batch * c.dims.time * c.dims.heads);
  for (std::size_t row = 0; row < rows; ++row) f(row, x.data() + row * channels);
}

/// Rows of q or k as their features: 1, x_i, x_i²/√2, x_i x_j for j < i.
Array<double> features(const Case& c, const Array<double>& x) {
  if (c.feature_map == FeatureMap::kNone) return x;
  Array<double> out;
  for_each_row(c, x, [&](std::size_t, const double* row) {
    out.push_back(1);
    out.insert(out.end(), row, row + c.dims.keys);
    for (std::int64_t i = 0; i < c.dims.keys; ++i) out.push_back(row[i] * row[i] / std::sqrt(2));
    for (std::int64_t i = 0; i < c.dims.keys; ++i)
      for (std::int64_t j = 0; j < i; ++j) out.push_back(row[i] * row[j]);
  });
  return out;
}

/// The gradient of x from that of its features; with `moduli` the sum of its terms' moduli.
Array<double> feature_gradient(const Case& c, const Array<double>& x, const Array<double>& d,
                               bool moduli = false) {
  if (c.feature_map == FeatureMap::kNone) return d;
  const auto n = static_cast<std::size_t>(c.dims.keys);
  Array<double> out(x.size());
  for_each_row(c, x, [&](std::size_t r, const double* given) {
    Array<double> row(given, given + n);
    if (moduli) row = oracle::moduli(row);
    const double* at = d.data() + r * static_cast<std::size_t>(state_keys(c)) + 1;
    double* const to = out.data() + r * n;
    for (std::size_t i = 0; i < n; ++i) to[i] += *at++;
    for (std::size_t i = 0; i < n; ++i) to[i] += *at++ * std::sqrt(2) * row[i];
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < i; ++j, ++at) {
        to[i] += *at * row[j];
        to[j] += *at * row[i];
      }
    }
  });
  return out;
}

/// (B, T, H, K) of transitions that a head's keys may share.
Array<Complex> for_each_key(const Case& c, const Array<Complex>& a) {
  if (c.per_key) return a;
  Array<Complex> out;
  for (const Complex& x : a) out.insert(out.end(), static_cast<std::size_t>(state_keys(c)), x);
  return out;
}
/// The sum over the keys of gradients of shared transitions.
Array<Complex> over_keys(const Case& c, const Array<Complex>& da) {
  if (c.per_key) return da;
  Array<Complex> out(transition_count(c));
  const auto keys = static_cast<std::size_t>(state_keys(c));
  for (std::size_t i = 0; i < da.size(); ++i) out[i / keys] += da[i];
  return out;
}

void set_numbers(const Case& c, Tensor& t, const Array<Complex>& values) {
  if (c.complex) return t.set(values);
  std::vector<double> reals;
  for (const Complex& x : values) reals.push_back(x.real());
  t.set(reals);
}

}  // namespace

std::string describe(const Case& c) {
  return describe(c.dtype, {c.dims.batch, c.dims.time, c.dims.heads}, c.reverse, c.layout) +
         " heads of " + std::to_string(c.dims.keys) + ", " + std::to_string(c.dims.values) +
         (c.complex ? " complex" : " real") + (c.per_key ? " per key" : "") +
         (c.feature_map == FeatureMap::kTaylor ? " taylor" : "");
}

Array<Complex> transitions(Random& random, std::size_t n, bool complex) {
  Array<Complex> a = random.ring(n, 0.99, 1);
  const Array<Complex> any = random.ring(n, 0, 1);
  for (std::size_t i = 0; i < n; ++i) {
    if (i % 3 == 1) a[i] = any[i];
    if (!complex) a[i] = std::copysign(std::abs(a[i]), a[i].real());
    if (i % 41 == 7) a[i] = 0;
    if (i % 43 == 9) a[i] = 1;
  }
  return a;
}

Outcome run_on(const Case& c, const Array<Complex>& a_values) {
  Random random(c.seed);
  const HeadDims n = c.dims;
  const Dims keys{n.batch, n.time, n.heads * n.keys}, values{n.batch, n.time, n.heads * n.values};
  const std::int64_t width = c.per_key ? n.keys : 1;
  const Dims per_head{n.batch, n.time, n.heads * width};
  const Dims state{n.batch, 1, n.heads * state_keys(c) * n.values};
  const DType states = state_type(c);
  Tensor q(c.dtype, keys, c.layout), k(c.dtype, keys, c.layout), v(c.dtype, values, c.layout),
      y(c.dtype, values, c.layout), dy(c.dtype, values, c.layout), dq(c.dtype, keys, c.layout),
      dk(c.dtype, keys, c.layout), dv(c.dtype, values, c.layout);
  Tensor a(states, per_head, c.layout), da(states, per_head, c.layout);
  Tensor initial(states, state), final_state(states, state), dfinal(states, state),
      dinitial(states, state);
  Tensor saved_states(accumulation(c.dtype), {n.batch, gate_loop_chunks(n.time, c.per_key),
                                              state.channels * (c.complex ? 2 : 1)});
  q.set(unequal_channels(random.normal(elements(keys)), c.dims.keys));
  k.set(first_steps(random.normal(elements(keys)), keys, c.sound));
  v.set(unequal_channels(random.normal(elements(values)), c.dims.values));
  dy.set(first_steps(random.normal(elements(values)), values, c.sound));
  set_numbers(c, a, a_values);
  set_numbers(c, initial, unequal_channels(random.complex_normal(elements(state)), c.dims.values));
  set_numbers(c, dfinal, random.complex_normal(elements(state)));

  recurrence::GateLoop forward;
  forward.dtype = c.dtype;
  forward.shape = {n.batch, n.time, n.heads, n.keys, n.values};
  forward.complex = c.complex;
  forward.per_key = c.per_key;
  forward.feature_map = c.feature_map;
  forward.reverse = c.reverse;
  forward.q = heads(std::as_const(q), n.keys);
  forward.k = heads(std::as_const(k), n.keys);
  forward.v = heads(std::as_const(v), n.values);
  forward.a = heads(std::as_const(a), width);
  forward.y = heads(y, n.values);
  forward.saved_states = saved_states.data();
  if (c.states) {
    forward.initial_state = initial.data();
    forward.final_state = final_state.data();
  }
  execute(forward, c.threads);

  recurrence::GateLoopBackward backward;
  backward.dtype = c.dtype;
  backward.shape = forward.shape;
  backward.complex = c.complex;
  backward.per_key = c.per_key;
  backward.feature_map = c.feature_map;
  backward.reverse = c.reverse;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.a = forward.a;
  if (c.gradient) backward.dy = heads(std::as_const(dy), n.values);
  backward.saved_states = saved_states.data();
  backward.dq = heads(dq, n.keys);
  backward.dk = heads(dk, n.keys);
  backward.dv = heads(dv, n.values);
  backward.da = heads(da, width);
  if (c.states) {
    backward.dfinal_state = dfinal.data();
    backward.dinitial_state = dinitial.data();
  }
  execute(backward, c.threads);

  for (const Tensor* t : {&q, &k, &v, &y, &dy, &dq, &dk, &dv, &a, &da, &initial, &final_state,
                          &dfinal, &dinitial, &saved_states}) {
    t->expect_guards_intact("array");
  }
  Outcome out;
  out.q = q.get();
  out.k = k.get();
  out.in = {features(c, out.q), features(c, out.k), v.get(), for_each_key(c, complex_of(c, a)), {}};
  out.y = y.get();
  out.dq = dq.get();
  out.dk = dk.get();
  out.dv = dv.get();
  out.da = complex_of(c, da);
  const std::vector<double> saved = saved_states.get();
  const std::size_t one = static_cast<std::size_t>(state_keys(c) * n.values);
  const std::size_t parts = c.complex ? 2 : 1;
  for (std::size_t i = 0; i < saved.size(); i += parts * one) {
    for (std::size_t j = 0; j < one; ++j) {
      out.saved_states.emplace_back(saved[i + j], c.complex ? saved[i + one + j] : 0);
    }
  }
  if (c.gradient) out.dy = dy.get();
  if (c.states) {
    out.in.initial_state = complex_of(c, initial);
    out.final_state = complex_of(c, final_state);
    out.dfinal = complex_of(c, dfinal);
    out.dinitial = complex_of(c, dinitial);
  }
  return out;
}

std::size_t transition_count(const Case& c) {
  const HeadDims n = c.dims;
  return static_cast<std::size_t>(n.batch * n.time * n.heads * (c.per_key ? n.keys : 1));
}

Outcome run(const Case& c) {
  Random random(c.seed + 1);
  return run_on(c, transitions(random, transition_count(c), c.complex));
}

namespace {

std::vector<double> scales_of(const Array<double>& magnitudes, std::int64_t channels) {
  return scales(magnitudes, channels);
}
std::vector<double> scales_of(const Array<Complex>& magnitudes, std::int64_t channels) {
  std::vector<double> reals;
  for (const Complex& x : magnitudes) reals.push_back(x.real());
  return scales(reals, channels);
}

Array<Complex> real_parts(Array<Complex> values) {
  for (Complex& x : values) x = x.real();
  return values;
}

}  // namespace

void check(const Case& c, const Outcome& out) {
  SCOPED_TRACE(describe(c));
  const HeadDims n = oracle_dims(c);
  const std::int64_t roundings = n.time + n.keys + n.values;
  // Channels: of q and k (before the feature map), of v and y, and of a state.
  const std::int64_t keys = n.heads * c.dims.keys, values = n.heads * n.values;
  const std::int64_t state = n.heads * n.keys * n.values;
  const Tolerance close = tolerance(c.dtype, roundings);
  const Tolerance close_state = tolerance(accumulation(c.dtype), roundings);
  const auto forward = oracle::gate_loop(n, c.reverse, out.in);
  const auto size = oracle::gate_loop(n, c.reverse, oracle::moduli(out.in));
  expect_near(out.y, forward.y, scales_of(size.y, values), close, "y");
  if (c.states) {
    expect_near(out.final_state, forward.final_state, scales_of(size.final_state, state),
                close_state, "final");
  }
  Array<Complex> saved;
  for (std::int64_t b = 0; b < n.batch; ++b) {
    for (std::int64_t s = 0; s < n.time; s += recurrence::gate_loop_chunk(c.per_key)) {
      const auto first = forward.states.begin() + (s * n.batch + b) * state;
      saved.insert(saved.end(), first, first + state);
    }
  }
  expect_near(out.saved_states, saved, scales_of(size.states, state), close_state, "saved_states");

  auto backward = oracle::gate_loop_backward(n, c.reverse, out.in, out.dy, out.dfinal);
  auto bound = oracle::gate_loop_backward(n, c.reverse, oracle::moduli(out.in),
                                          oracle::moduli(out.dy), oracle::moduli(out.dfinal));
  if (!c.complex) backward.da = real_parts(backward.da);
  backward.da = over_keys(c, backward.da);
  bound.da = over_keys(c, bound.da);
  backward.dq = feature_gradient(c, out.q, backward.dq);
  backward.dk = feature_gradient(c, out.k, backward.dk);
  bound.dq = feature_gradient(c, out.q, bound.dq, /*moduli=*/true);
  bound.dk = feature_gradient(c, out.k, bound.dk, /*moduli=*/true);
  expect_near(out.dq, backward.dq, scales_of(bound.dq, keys), close, "dq");
  expect_near(out.dk, backward.dk, scales_of(bound.dk, keys), close, "dk");
  expect_near(out.dv, backward.dv, scales_of(bound.dv, values), close, "dv");
  expect_near(out.da, backward.da, scales_of(bound.da, n.heads * (c.per_key ? n.keys : 1)),
              close_state, "da");
  if (c.states) {
    expect_near(out.dinitial, backward.dinitial, scales_of(bound.dinitial, state), close_state,
                "dinitial");
  }
}
void check(const Case& c) { check(c, run(c)); }

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  expect_same_bits(a.y, b.y, what + " y");
  expect_same_bits(a.final_state, b.final_state, what + " final");
  expect_same_bits(a.saved_states, b.saved_states, what + " saved_states");
  expect_same_bits(a.dq, b.dq, what + " dq");
  expect_same_bits(a.dk, b.dk, what + " dk");
  expect_same_bits(a.dv, b.dv, what + " dv");
  expect_same_bits(a.da, b.da, what + " da");
  expect_same_bits(a.dinitial, b.dinitial, what + " dinitial");
}

}  // namespace gateloop::testing::gate_loop
