#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace gateloop::oracle {
namespace {

double conj(double x) { return x; }
Complex conj(Complex x) { return std::conj(x); }

/// Index of channel c at the s-th step of the scan.
struct Index {
  Dims n;
  bool reverse;
  std::size_t operator()(std::int64_t b, std::int64_t s, std::int64_t c) const {
    const std::int64_t t = reverse ? n.time - 1 - s : s;
    return static_cast<std::size_t>((b * n.time + t) * n.channels + c);
  }
  std::size_t state(std::int64_t b, std::int64_t c) const {
    return static_cast<std::size_t>(b * n.channels + c);
  }
  std::size_t elements() const { return static_cast<std::size_t>(n.batch * n.time * n.channels); }
  std::size_t states() const { return static_cast<std::size_t>(n.batch * n.channels); }
};

template <class N>
N or_zero(const Array<N>& array, std::size_t i) {
  return array.empty() ? N{} : array[i];
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
/// σ' without the cancellation of 1 - σ.
double sigmoid_slope(double x) {
  const double e = std::exp(-std::fabs(x));
  return e / ((1 + e) * (1 + e));
}

template <class F>
void for_each_channel(const Dims& n, const F& f) {
  for (std::int64_t b = 0; b < n.batch; ++b) {
    for (std::int64_t c = 0; c < n.channels; ++c) f(b, c);
  }
}

}  // namespace

template <class N>
Linear<N> linear_recurrence(Dims n, bool reverse, const Array<N>& a, const Array<N>& x,
                            const Array<N>& initial_state) {
  const Index at{n, reverse};
  Linear<N> out{Array<N>(at.elements()), Array<N>(at.states())};
  for_each_channel(n, [&](std::int64_t b, std::int64_t c) {
    N h = or_zero(initial_state, at.state(b, c));
    for (std::int64_t s = 0; s < n.time; ++s) {
      const std::size_t i = at(b, s, c);
      h = a[i] * h + x[i];
      out.h[i] = h;
    }
    out.final_state[at.state(b, c)] = h;
  });
  return out;
}

template <class N>
LinearGradients<N> linear_recurrence_backward(Dims n, bool reverse, const Array<N>& a,
                                              const Array<N>& h, const Array<N>& initial_state,
                                              const Array<N>& dh, const Array<N>& dfinal) {
  const Index at{n, reverse};
  LinearGradients<N> out{Array<N>(at.elements()), Array<N>(at.elements()), Array<N>(at.states())};
  for_each_channel(n, [&](std::int64_t b, std::int64_t c) {
    N carry = or_zero(dfinal, at.state(b, c));  // conj(a_{t+1}) g_{t+1}
    for (std::int64_t s = n.time - 1; s >= 0; --s) {
      const std::size_t i = at(b, s, c);
      const N before = s > 0 ? h[at(b, s - 1, c)] : or_zero(initial_state, at.state(b, c));
      const N g = or_zero(dh, i) + carry;
      out.dx[i] = g;
      out.da[i] = g * conj(before);
      carry = conj(a[i]) * g;
    }
    out.dinitial[at.state(b, c)] = carry;
  });
  return out;
}

template Linear<double> linear_recurrence(Dims, bool, const Array<double>&, const Array<double>&,
                                          const Array<double>&);
template Linear<Complex> linear_recurrence(Dims, bool, const Array<Complex>&, const Array<Complex>&,
                                           const Array<Complex>&);
template LinearGradients<double> linear_recurrence_backward(Dims, bool, const Array<double>&,
                                                            const Array<double>&,
                                                            const Array<double>&,
                                                            const Array<double>&,
                                                            const Array<double>&);
template LinearGradients<Complex> linear_recurrence_backward(Dims, bool, const Array<Complex>&,
                                                             const Array<Complex>&,
                                                             const Array<Complex>&,
                                                             const Array<Complex>&,
                                                             const Array<Complex>&);

Complex polar_gate(Complex z) {
  const double r = std::abs(z);
  return r == 0 ? Complex(0.5) : sigmoid(r) * (z / r);
}

PolarGateLoop polar_gate_loop(Dims n, bool reverse, const PolarGateLoopInputs& in) {
  const Index at{n, reverse};
  PolarGateLoop out{Array<double>(at.elements()), Array<Complex>(at.states()),
                    Array<Complex>(at.elements())};
  for_each_channel(n, [&](std::int64_t b, std::int64_t c) {
    Complex h = or_zero(in.initial_state, at.state(b, c));
    for (std::int64_t s = 0; s < n.time; ++s) {
      const std::size_t i = at(b, s, c);
      out.states[i] = h;
      h = polar_gate(in.z[i]) * h + in.k[i] * in.v[i];
      out.y[i] = in.q[i] * h.real();
    }
    out.final_state[at.state(b, c)] = h;
  });
  return out;
}

PolarGateLoopGradients polar_gate_loop_backward(Dims n, bool reverse, const PolarGateLoopInputs& in,
                                                const Array<double>& dy,
                                                const Array<Complex>& dfinal) {
  const Index at{n, reverse};
  const PolarGateLoop forward = polar_gate_loop(n, reverse, in);
  const std::size_t size = at.elements();
  PolarGateLoopGradients out{Array<double>(size), Array<double>(size), Array<double>(size),
                             Array<Complex>(size), Array<Complex>(at.states())};
  for_each_channel(n, [&](std::int64_t b, std::int64_t c) {
    Complex carry = or_zero(dfinal, at.state(b, c));
    for (std::int64_t s = n.time - 1; s >= 0; --s) {
      const std::size_t i = at(b, s, c);
      const Complex a = polar_gate(in.z[i]), before = forward.states[i];
      const Complex h = a * before + in.k[i] * in.v[i];
      const Complex g = in.q[i] * or_zero(dy, i) + carry;
      out.dq[i] = or_zero(dy, i) * h.real();
      out.dk[i] = in.v[i] * g.real();
      out.dv[i] = in.k[i] * g.real();
      const Complex da = g * std::conj(before);
      const double r = std::abs(in.z[i]);
      if (r > 0) {
        const Complex u = in.z[i] / r, w = da * std::conj(u);
        out.dz[i] = u * Complex(w.real() * sigmoid_slope(r), w.imag() * sigmoid(r) / r);
      }
      carry = std::conj(a) * g;
    }
    out.dinitial[at.state(b, c)] = carry;
  });
  return out;
}

Simple simple_gate_loop(Dims n, bool reverse, bool normalize_input, const SimpleInputs& in) {
  const Index at{n, reverse};
  Simple out{Array<double>(at.elements()), Array<double>(at.states()),
             Array<double>(at.elements())};
  for_each_channel(n, [&](std::int64_t b, std::int64_t c) {
    double h = or_zero(in.initial_state, at.state(b, c));
    for (std::int64_t s = 0; s < n.time; ++s) {
      const std::size_t i = at(b, s, c);
      out.states[i] = h;
      h = sigmoid(in.z[i]) * h + (normalize_input ? sigmoid(-in.z[i]) : 1) * in.kv[i];
      out.y[i] = in.q[i] * h;
    }
    out.final_state[at.state(b, c)] = h;
  });
  return out;
}

SimpleGradients simple_gate_loop_backward(Dims n, bool reverse, bool normalize_input,
                                          const SimpleInputs& in, const Array<double>& dy,
                                          const Array<double>& dfinal) {
  const Index at{n, reverse};
  const Simple forward = simple_gate_loop(n, reverse, normalize_input, in);
  const std::size_t size = at.elements();
  SimpleGradients out{Array<double>(size), Array<double>(size), Array<double>(size),
                      Array<double>(at.states())};
  for_each_channel(n, [&](std::int64_t b, std::int64_t c) {
    double carry = or_zero(dfinal, at.state(b, c));
    for (std::int64_t s = n.time - 1; s >= 0; --s) {
      const std::size_t i = at(b, s, c);
      const double a = sigmoid(in.z[i]), before = forward.states[i];
      const double rest = normalize_input ? sigmoid(-in.z[i]) : 1;
      const double g = in.q[i] * or_zero(dy, i) + carry;
      out.dq[i] = or_zero(dy, i) * (a * before + rest * in.kv[i]);
      out.dkv[i] = rest * g;
      const double da = g * before - (normalize_input ? g * in.kv[i] : 0);
      out.dz[i] = da * sigmoid_slope(in.z[i]);
      carry = a * g;
    }
    out.dinitial[at.state(b, c)] = carry;
  });
  return out;
}

namespace {

template <class N>
Array<double> absolute(const Array<N>& values) {
  Array<double> out;
  for (const N& x : values) out.push_back(std::abs(x));
  return out;
}

/// |a b|, element by element; empty if one is.
template <class N>
Array<double> product(const Array<N>& a, const Array<N>& b) {
  Array<double> out;
  for (std::size_t i = 0; i < a.size() && i < b.size(); ++i) out.push_back(std::abs(a[i] * b[i]));
  return out;
}

}  // namespace

template <class N>
LinearMagnitudes linear_magnitudes(Dims n, bool reverse, const Array<N>& a, const Array<N>& x,
                                   const Array<N>& initial_state, const Array<N>& dh,
                                   const Array<N>& dfinal) {
  const Array<double> modulus = absolute(a), initial = absolute(initial_state);
  Array<double> h = linear_recurrence(n, reverse, modulus, absolute(x), initial).h;
  auto back =
      linear_recurrence_backward(n, reverse, modulus, h, initial, absolute(dh), absolute(dfinal));
  Array<double> states = h;
  states.insert(states.end(), initial.begin(), initial.end());
  return {std::move(h), std::move(states), std::move(back.da), std::move(back.dx),
          std::move(back.dinitial)};
}

template LinearMagnitudes linear_magnitudes(Dims, bool, const Array<double>&, const Array<double>&,
                                            const Array<double>&, const Array<double>&,
                                            const Array<double>&);
template LinearMagnitudes linear_magnitudes(Dims, bool, const Array<Complex>&,
                                            const Array<Complex>&, const Array<Complex>&,
                                            const Array<Complex>&, const Array<Complex>&);

PolarGateLoopMagnitudes polar_gate_loop_magnitudes(Dims n, bool reverse,
                                                   const PolarGateLoopInputs& in,
                                                   const Array<double>& dy,
                                                   const Array<Complex>& dfinal) {
  Array<double> a, slope;
  for (const Complex z : in.z) {
    const double r = std::abs(z);
    a.push_back(std::abs(polar_gate(z)));
    slope.push_back(r == 0 ? 0 : std::max(sigmoid_slope(r), sigmoid(r) / r));
  }
  const auto m = linear_magnitudes(n, reverse, a, product(in.k, in.v), absolute(in.initial_state),
                                   product(in.q, dy), absolute(dfinal));
  return {
      product(in.q, m.h),   m.states,  product(dy, m.h), product(in.v, m.dx), product(in.k, m.dx),
      product(m.da, slope), m.dinitial};
}

SimpleMagnitudes simple_gate_loop_magnitudes(Dims n, bool reverse, bool normalize_input,
                                             const SimpleInputs& in, const Array<double>& dy,
                                             const Array<double>& dfinal) {
  Array<double> a, rest, slope;
  for (const double z : in.z) {
    a.push_back(sigmoid(z));
    rest.push_back(normalize_input ? sigmoid(-z) : 1);
    slope.push_back(sigmoid_slope(z));
  }
  const auto m = linear_magnitudes(n, reverse, a, product(rest, in.kv), in.initial_state,
                                   product(in.q, dy), dfinal);
  Array<double> da = m.da;
  if (normalize_input) {
    for (std::size_t i = 0; i < da.size(); ++i) da[i] += std::abs(m.dx[i] * in.kv[i]);
  }
  return {product(in.q, m.h),  m.states,           product(dy, m.h),
          product(rest, m.dx), product(da, slope), m.dinitial};
}

}  // namespace gateloop::oracle
