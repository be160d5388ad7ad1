#pragma once

/// The fused GateLoop read, max heads: polar gate, complex state, real read-out; and its adjoint.
#include <cstdint>

#include "gateloop/recurrence.h"
#include "recurrence/cuda/gates-inl.h"
#include "recurrence/cuda/plan-inl.h"
#include "recurrence/cuda/scan-inl.h"

namespace gateloop::recurrence::cuda {

template <class S, class V, int kChannels_>
struct PolarGateLoopOp {
  using Value = V;  // Complex<T>
  using T = typename V::Scalar;
  static constexpr int kChannels = kChannels_;
  static constexpr bool kBackwards = false, kSaves = true, kRecomputes = false;
  struct Numbers {
    Lane<S, kChannels> q, k, v;
    Lane<S, 2 * kChannels> z;
  };
  struct Step {
    V a[kChannels];
    T x[kChannels];
    Lane<S, kChannels> q;
  };

  View<const S, 1, kChannels> q, k, v;
  View<const S, 2, kChannels> z;
  View<S, 1, kChannels> y;
  View<const T, 2, kChannels> initial;
  View<T, 2, kChannels> final_state, saved;
  bool whole;  // all sequences are given and read in whole accesses

  explicit PolarGateLoopOp(const PolarGateLoop& p) {
    whole = bind(q, p.q, 1, p.reverse) & bind(k, p.k, 1, p.reverse) & bind(v, p.v, 1, p.reverse) &
            bind(z, p.z, 1, p.reverse) & bind(y, p.y, 1, p.reverse);
    bind_state(initial, p.initial_state, p.shape);
    bind_state(final_state, p.final_state, p.shape);
    bind_state(saved, p.saved_states, p.shape);
  }

  template <class Memory, class AnyPlace>
  GATELOOP_HD Numbers load(Memory& memory, const AnyPlace& p, int i) const {
    return {q.load(memory, p, i), k.load(memory, p, i), v.load(memory, p, i), z.load(memory, p, i)};
  }
  GATELOOP_HD Step step(const Numbers& t) const {
    Step step;
    step.q = t.q;
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      step.a[c] = polar_gate<S>(From<V>::lane(t.z, c)).a;
      step.x[c] = widen(t.k.get(c)) * widen(t.v.get(c));
    }
    return step;
  }
  GATELOOP_HD Affine<V> transition(const Step& step, int c) const {
    return {step.a[c], From<V>::real(step.x[c])};
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void apply(Memory& memory, const AnyPlace& p, int i, const Step& step,
                         V (&state)[kChannels]) const {
    Lane<S, kChannels> out{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      state[c] = cuda::apply(transition(step, c), state[c]);
      put(Real<T>{widen(step.q.get(c)) * state[c].re}, out, c);
    }
    y.store(memory, p, i, out);
  }
};

/// The carry is conj(a_t) g_t, as in the linear recurrence.
template <class S, class V, int kChannels_>
struct PolarGateLoopAdjointOp {
  using Value = V;  // Complex<T>
  using T = typename V::Scalar;
  static constexpr int kChannels = kChannels_;
  static constexpr bool kBackwards = true, kSaves = false, kRecomputes = true;
  struct Numbers {
    Lane<S, kChannels> q, k, v, dy;
    Lane<S, 2 * kChannels> z;
  };
  struct Step {
    PolarGate<T> gate[kChannels];
    Lane<S, kChannels> q, k, v, dy;
  };

  View<const S, 1, kChannels> q, k, v, dy;
  View<const S, 2, kChannels> z;
  View<S, 1, kChannels> dq, dk, dv;
  View<S, 2, kChannels> dz;
  View<const T, 2, kChannels> initial;  // of the carry: dfinal_state
  View<T, 2, kChannels> final_state;    // dinitial_state
  View<const T, 2, kChannels> saved;
  bool whole;  // all sequences are given and read in whole accesses

  explicit PolarGateLoopAdjointOp(const PolarGateLoopBackward& p) {
    whole = bind(q, p.q, 1, p.reverse) & bind(k, p.k, 1, p.reverse) & bind(v, p.v, 1, p.reverse) &
            bind(dy, p.dy, 1, p.reverse) & bind(z, p.z, 1, p.reverse) &
            bind(dq, p.dq, 1, p.reverse) & bind(dk, p.dk, 1, p.reverse) &
            bind(dv, p.dv, 1, p.reverse) & bind(dz, p.dz, 1, p.reverse);
    bind_state(initial, p.dfinal_state, p.shape);
    bind_state(final_state, p.dinitial_state, p.shape);
    bind_state(saved, p.saved_states, p.shape);
  }

  template <class Memory, class AnyPlace>
  GATELOOP_HD Numbers load(Memory& memory, const AnyPlace& p, int i) const {
    return {q.load(memory, p, i), k.load(memory, p, i), v.load(memory, p, i), dy.load(memory, p, i),
            z.load(memory, p, i)};
  }
  GATELOOP_HD Step step(const Numbers& t) const {
    Step step;
    step.q = t.q;
    step.k = t.k;
    step.v = t.v;
    step.dy = t.dy;
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) step.gate[c] = polar_gate<S>(From<V>::lane(t.z, c));
    return step;
  }
  GATELOOP_HD Affine<V> transition(const Step& step, int c) const {
    const V a = conj(step.gate[c].a);
    const T g = widen(step.q.get(c)) * widen(step.dy.get(c));
    return {a, {a.re * g, a.im * g}};
  }
  GATELOOP_HD Affine<V> forward_transition(const Step& step, int c) const {
    return {step.gate[c].a, From<V>::real(widen(step.k.get(c)) * widen(step.v.get(c)))};
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void apply(Memory& memory, const AnyPlace& p, int i, const Step& step,
                         const V (&before)[kChannels], V (&carry)[kChannels]) const {
    Lane<S, kChannels> dq_t{}, dk_t{}, dv_t{};
    Lane<S, 2 * kChannels> dz_t{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const PolarGate<T>& gate = step.gate[c];
      const T dy_t = widen(step.dy.get(c));
      const V h = cuda::apply(forward_transition(step, c), before[c]);
      const V g{std::fma(widen(step.q.get(c)), dy_t, carry[c].re), carry[c].im};
      put(Real<T>{dy_t * h.re}, dq_t, c);
      put(Real<T>{widen(step.v.get(c)) * g.re}, dk_t, c);
      put(Real<T>{widen(step.k.get(c)) * g.re}, dv_t, c);
      carry[c] = mul(conj(gate.a), g);
      // da conj(a) = g conj(h_{t-1}) conj(a) = carry conj(h_{t-1})
      const V w = mul(carry[c], conj(before[c]));
      put(mul(gate.a, V{w.re * gate.radial, w.im * gate.tangential}), dz_t, c);
    }
    dq.store(memory, p, i, dq_t);
    dk.store(memory, p, i, dk_t);
    dv.store(memory, p, i, dv_t);
    dz.store(memory, p, i, dz_t);
  }
};

template <class F>
void visit(const PolarGateLoop& p, const F& f) {
  check("PolarGateLoop", p, /*complex_allowed=*/false);
  if (is_step(p)) return visit_real<PolarGateLoopOp, step_launch, Complex>(p, f);
  visit_real<PolarGateLoopOp, polar_launch, Complex>(p, f);
}
template <class F>
void visit(const PolarGateLoopBackward& p, const F& f) {
  check("PolarGateLoopBackward", p, /*complex_allowed=*/false);
  visit_real<PolarGateLoopAdjointOp, polar_backward_launch, Complex>(p, f);
}

}  // namespace gateloop::recurrence::cuda
