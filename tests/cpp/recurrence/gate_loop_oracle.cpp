#include <cmath>

#include "oracle.h"

namespace gateloop::oracle {
namespace {

/// Where the rows of one head begin at the s-th step of the scan.
struct HeadIndex {
  HeadDims n;
  bool reverse;
  std::size_t transition(std::int64_t unit, std::int64_t s) const {
    const std::int64_t t = reverse ? n.time - 1 - s : s;
    return static_cast<std::size_t>((unit / n.heads * n.time + t) * n.heads + unit % n.heads);
  }
  std::size_t key(std::int64_t unit, std::int64_t s) const {
    return transition(unit, s) * static_cast<std::size_t>(n.keys);
  }
  std::size_t value(std::int64_t unit, std::int64_t s) const {
    return transition(unit, s) * static_cast<std::size_t>(n.values);
  }
  std::size_t keys() const { return static_cast<std::size_t>(n.keys); }
  std::size_t values() const { return static_cast<std::size_t>(n.values); }
  std::size_t state() const { return keys() * values(); }
  std::int64_t units() const { return n.batch * n.heads; }
  std::size_t steps() const { return static_cast<std::size_t>(n.batch * n.time * n.heads); }
};

Array<Complex> state_of(const Array<Complex>& states, std::int64_t unit, std::size_t size) {
  if (states.empty()) return Array<Complex>(size);
  const auto first = states.begin() + unit * static_cast<std::ptrdiff_t>(size);
  return {first, first + static_cast<std::ptrdiff_t>(size)};
}

}  // namespace

GateLoop gate_loop(HeadDims n, bool reverse, const GateLoopInputs& in) {
  const HeadIndex at{n, reverse};
  GateLoop out{Array<double>(at.steps() * at.values()), {}, {}};
  out.states.resize(at.steps() * at.state());
  for (std::int64_t unit = 0; unit < at.units(); ++unit) {
    Array<Complex> state = state_of(in.initial_state, unit, at.state());
    for (std::int64_t s = 0; s < n.time; ++s) {
      const std::size_t key = at.key(unit, s), value = at.value(unit, s);
      std::copy(
          state.begin(), state.end(),
          out.states.begin() + (s * at.units() + unit) * static_cast<std::ptrdiff_t>(at.state()));
      for (std::size_t k = 0; k < at.keys(); ++k) {
        for (std::size_t v = 0; v < at.values(); ++v) {
          Complex& h = state[k * at.values() + v];
          h = in.a[key + k] * h + in.k[key + k] * in.v[value + v];
          out.y[value + v] += in.q[key + k] * h.real();
        }
      }
    }
    out.final_state.insert(out.final_state.end(), state.begin(), state.end());
  }
  return out;
}

GateLoopGradients gate_loop_backward(HeadDims n, bool reverse, const GateLoopInputs& in,
                                     const Array<double>& dy, const Array<Complex>& dfinal) {
  const HeadIndex at{n, reverse};
  const Array<Complex> states = gate_loop(n, reverse, in).states;
  GateLoopGradients out{Array<double>(in.q.size()),
                        Array<double>(in.k.size()),
                        Array<double>(in.v.size()),
                        Array<Complex>(in.a.size()),
                        {}};
  for (std::int64_t unit = 0; unit < at.units(); ++unit) {
    Array<Complex> carry = state_of(dfinal, unit, at.state());  // conj(a_{t+1}) g_{t+1}
    for (std::int64_t s = n.time - 1; s >= 0; --s) {
      const std::size_t key = at.key(unit, s), value = at.value(unit, s);
      const auto before =
          states.begin() + (s * at.units() + unit) * static_cast<std::ptrdiff_t>(at.state());
      for (std::size_t k = 0; k < at.keys(); ++k) {
        for (std::size_t v = 0; v < at.values(); ++v) {
          const std::size_t i = k * at.values() + v;
          const Complex a = in.a[key + k];
          const Complex h = before[static_cast<std::ptrdiff_t>(i)];
          const double local = dy.empty() ? 0 : dy[value + v];
          const Complex g = in.q[key + k] * local + carry[i];
          out.dq[key + k] += (a * h + in.k[key + k] * in.v[value + v]).real() * local;
          out.dk[key + k] += g.real() * in.v[value + v];
          out.dv[value + v] += g.real() * in.k[key + k];
          out.da[key + k] += g * std::conj(h);
          carry[i] = std::conj(a) * g;
        }
      }
    }
    out.dinitial.insert(out.dinitial.end(), carry.begin(), carry.end());
  }
  return out;
}

Array<double> moduli(const Array<double>& values) {
  Array<double> out;
  for (const double x : values) out.push_back(std::fabs(x));
  return out;
}
Array<Complex> moduli(const Array<Complex>& values) {
  Array<Complex> out;
  for (const Complex x : values) out.emplace_back(std::abs(x));
  return out;
}
GateLoopInputs moduli(const GateLoopInputs& in) {
  return {moduli(in.q), moduli(in.k), moduli(in.v), moduli(in.a), moduli(in.initial_state)};
}

}  // namespace gateloop::oracle
