#pragma once

/// The definition of every operation and its adjoint: plain loops in double precision, written from
/// the formulas in docs/math.md. All sequences are dense (B, T, D), states (B, D).
#include <complex>
#include <cstdint>
#include <vector>

namespace gateloop::oracle {

using Complex = std::complex<double>;
template <class N>
using Array = std::vector<N>;

struct Dims {
  std::int64_t batch, time, channels;
};

template <class N>
struct Linear {
  Array<N> h, final_state;
};
template <class N>
struct LinearGradients {
  Array<N> da, dx, dinitial;
};
/// N is double or Complex. An empty initial_state, dh or dfinal counts as zeros, here and below.
template <class N>
Linear<N> linear_recurrence(Dims, bool reverse, const Array<N>& a, const Array<N>& x,
                            const Array<N>& initial_state);
template <class N>
LinearGradients<N> linear_recurrence_backward(Dims, bool reverse, const Array<N>& a,
                                              const Array<N>& h, const Array<N>& initial_state,
                                              const Array<N>& dh, const Array<N>& dfinal);

/// a = σ(|z|) z/|z|, 0.5 at z = 0.
Complex polar_gate(Complex z);

struct PolarGateLoopInputs {
  Array<double> q, k, v;
  Array<Complex> z, initial_state;
};
struct PolarGateLoop {
  Array<double> y;
  Array<Complex> final_state;
  Array<Complex> states;  // (B, T, D) state before each step, by time
};
struct PolarGateLoopGradients {
  Array<double> dq, dk, dv;
  Array<Complex> dz, dinitial;
};
PolarGateLoop polar_gate_loop(Dims, bool reverse, const PolarGateLoopInputs&);
PolarGateLoopGradients polar_gate_loop_backward(Dims, bool reverse, const PolarGateLoopInputs&,
                                                const Array<double>& dy,
                                                const Array<Complex>& dfinal);

struct SimpleInputs {
  Array<double> q, kv, z, initial_state;
};
struct Simple {
  Array<double> y, final_state, states;
};
struct SimpleGradients {
  Array<double> dq, dkv, dz, dinitial;
};
Simple simple_gate_loop(Dims, bool reverse, bool normalize_input, const SimpleInputs&);
SimpleGradients simple_gate_loop_backward(Dims, bool reverse, bool normalize_input,
                                          const SimpleInputs&, const Array<double>& dy,
                                          const Array<double>& dfinal);

struct HeadDims {
  std::int64_t batch, time, heads, keys, values;
};
/// q, k: (B, T, H, K), v: (B, T, H, V), a: (B, T, H, K), states (B, H, K, V). Real transitions have
/// no imaginary part, and of their gradients only the real part counts.
struct GateLoopInputs {
  Array<double> q, k, v;
  Array<Complex> a, initial_state;
};
struct GateLoop {
  Array<double> y;
  Array<Complex> final_state;
  Array<Complex> states;  // (T, B, H, K, V): the state before each step, in scan order
};
struct GateLoopGradients {
  Array<double> dq, dk, dv;
  Array<Complex> da, dinitial;
};
GateLoop gate_loop(HeadDims, bool reverse, const GateLoopInputs&);
GateLoopGradients gate_loop_backward(HeadDims, bool reverse, const GateLoopInputs&,
                                     const Array<double>& dy, const Array<Complex>& dfinal);
/// The absolute values of the inputs: what the operation makes of these bounds what it adds up.
GateLoopInputs moduli(const GateLoopInputs&);
Array<double> moduli(const Array<double>&);
Array<Complex> moduli(const Array<Complex>&);

/// Bounds on what an operation adds up: its arithmetic on absolute values, where no terms cancel.
/// Rounding errors are fractions of these. An empty array stays empty.
struct LinearMagnitudes {
  Array<double> h, states, da, dx, dinitial;  // states: h and the initial state
};
template <class N>
LinearMagnitudes linear_magnitudes(Dims, bool reverse, const Array<N>& a, const Array<N>& x,
                                   const Array<N>& initial_state, const Array<N>& dh,
                                   const Array<N>& dfinal);

struct PolarGateLoopMagnitudes {
  Array<double> y, states, dq, dk, dv, dz, dinitial;
};
PolarGateLoopMagnitudes polar_gate_loop_magnitudes(Dims, bool reverse, const PolarGateLoopInputs&,
                                                   const Array<double>& dy,
                                                   const Array<Complex>& dfinal);

struct SimpleMagnitudes {
  Array<double> y, states, dq, dkv, dz, dinitial;
};
SimpleMagnitudes simple_gate_loop_magnitudes(Dims, bool reverse, bool normalize_input,
                                             const SimpleInputs&, const Array<double>& dy,
                                             const Array<double>& dfinal);

}  // namespace gateloop::oracle
