#pragma once

/// The simple gate loop: sigmoid gate, real state, real read-out; and its adjoint. Whether inputs
/// are normalized is compiled in: a condition in every step costs a quarter of the speed.
#include <cstdint>

#include "gateloop/recurrence.h"
#include "recurrence/cuda/gates-inl.h"
#include "recurrence/cuda/plan-inl.h"
#include "recurrence/cuda/scan-inl.h"

namespace gateloop::recurrence::cuda {

template <bool kNormalize, class T>
GATELOOP_HD T input_of(const SigmoidGate<T>& gate, T value) {
  return kNormalize ? gate.rest * value : value;
}

template <class S, class V, int kChannels_, bool kNormalize>
struct SimpleGateLoopOp {
  using Value = V;  // Real<T>
  using T = typename V::Scalar;
  static constexpr int kChannels = kChannels_;
  static constexpr bool kBackwards = false, kSaves = true, kRecomputes = false;
  struct Numbers {
    Lane<S, kChannels> q, kv, z;
  };
  struct Step {
    T a[kChannels], x[kChannels];
    Lane<S, kChannels> q;
  };

  View<const S, 1, kChannels> q, kv, z;
  View<S, 1, kChannels> y;
  View<const T, 1, kChannels> initial;
  View<T, 1, kChannels> final_state, saved;
  bool whole;  // all sequences are given and read in whole accesses

  explicit SimpleGateLoopOp(const SimpleGateLoop& p) {
    whole = bind(q, p.q, 1, p.reverse) & bind(kv, p.kv, 1, p.reverse) & bind(z, p.z, 1, p.reverse) &
            bind(y, p.y, 1, p.reverse);
    bind_state(initial, p.initial_state, p.shape);
    bind_state(final_state, p.final_state, p.shape);
    bind_state(saved, p.saved_states, p.shape);
  }

  template <class Memory, class AnyPlace>
  GATELOOP_HD Numbers load(Memory& memory, const AnyPlace& p, int i) const {
    return {q.load(memory, p, i), kv.load(memory, p, i), z.load(memory, p, i)};
  }
  GATELOOP_HD Step step(const Numbers& t) const {
    Step step;
    step.q = t.q;
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const auto gate = sigmoid_gate<S>(widen(t.z.get(c)));
      step.a[c] = gate.a;
      step.x[c] = input_of<kNormalize>(gate, widen(t.kv.get(c)));
    }
    return step;
  }
  GATELOOP_HD Affine<V> transition(const Step& step, int c) const {
    return {{step.a[c]}, {step.x[c]}};
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void apply(Memory& memory, const AnyPlace& p, int i, const Step& step,
                         V (&state)[kChannels]) const {
    Lane<S, kChannels> out{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      state[c] = cuda::apply(transition(step, c), state[c]);
      put(V{widen(step.q.get(c)) * state[c].re}, out, c);
    }
    y.store(memory, p, i, out);
  }
};

/// The carry is a_t g_t, as in the linear recurrence.
template <class S, class V, int kChannels_, bool kNormalize>
struct SimpleGateLoopAdjointOp {
  using Value = V;  // Real<T>
  using T = typename V::Scalar;
  static constexpr int kChannels = kChannels_;
  static constexpr bool kBackwards = true, kSaves = false, kRecomputes = true;
  struct Numbers {
    Lane<S, kChannels> q, kv, z, dy;
  };
  struct Step {
    SigmoidGate<T> gate[kChannels];
    Lane<S, kChannels> q, kv, dy;
  };

  View<const S, 1, kChannels> q, kv, z, dy;
  View<S, 1, kChannels> dq, dkv, dz;
  View<const T, 1, kChannels> initial;  // of the carry: dfinal_state
  View<T, 1, kChannels> final_state;    // dinitial_state
  View<const T, 1, kChannels> saved;
  bool whole;  // all sequences are given and read in whole accesses

  explicit SimpleGateLoopAdjointOp(const SimpleGateLoopBackward& p) {
    whole = bind(q, p.q, 1, p.reverse) & bind(kv, p.kv, 1, p.reverse) & bind(z, p.z, 1, p.reverse) &
            bind(dy, p.dy, 1, p.reverse) & bind(dq, p.dq, 1, p.reverse) &
            bind(dkv, p.dkv, 1, p.reverse) & bind(dz, p.dz, 1, p.reverse);
    bind_state(initial, p.dfinal_state, p.shape);
    bind_state(final_state, p.dinitial_state, p.shape);
    bind_state(saved, p.saved_states, p.shape);
  }

  template <class Memory, class AnyPlace>
  GATELOOP_HD Numbers load(Memory& memory, const AnyPlace& p, int i) const {
    return {q.load(memory, p, i), kv.load(memory, p, i), z.load(memory, p, i),
            dy.load(memory, p, i)};
  }
  GATELOOP_HD Step step(const Numbers& t) const {
    Step step;
    step.q = t.q;
    step.kv = t.kv;
    step.dy = t.dy;
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) step.gate[c] = sigmoid_gate<S>(widen(t.z.get(c)));
    return step;
  }
  GATELOOP_HD Affine<V> transition(const Step& step, int c) const {
    const T a = step.gate[c].a;
    return {{a}, {a * (widen(step.q.get(c)) * widen(step.dy.get(c)))}};
  }
  GATELOOP_HD Affine<V> forward_transition(const Step& step, int c) const {
    return {{step.gate[c].a}, {input_of<kNormalize>(step.gate[c], widen(step.kv.get(c)))}};
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void apply(Memory& memory, const AnyPlace& p, int i, const Step& step,
                         const V (&before)[kChannels], V (&carry)[kChannels]) const {
    Lane<S, kChannels> dq_t{}, dkv_t{}, dz_t{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const SigmoidGate<T>& gate = step.gate[c];
      const T dy_t = widen(step.dy.get(c));
      const V h = cuda::apply(forward_transition(step, c), before[c]);
      const T g = std::fma(widen(step.q.get(c)), dy_t, carry[c].re);
      put(V{dy_t * h.re}, dq_t, c);
      put(V{input_of<kNormalize>(gate, g)}, dkv_t, c);
      carry[c].re = gate.a * g;
      // da = g (h_{t-1} - kv_t [normalize]), dz = da a (1 - a)
      const T slope = kNormalize ? before[c].re - widen(step.kv.get(c)) : before[c].re;
      put(V{carry[c].re * slope * gate.rest}, dz_t, c);
    }
    dq.store(memory, p, i, dq_t);
    dkv.store(memory, p, i, dkv_t);
    dz.store(memory, p, i, dz_t);
  }
};

template <class S, class V, int kChannels>
using SimpleOp = SimpleGateLoopOp<S, V, kChannels, false>;
template <class S, class V, int kChannels>
using NormalizedOp = SimpleGateLoopOp<S, V, kChannels, true>;
template <class S, class V, int kChannels>
using SimpleAdjointOp = SimpleGateLoopAdjointOp<S, V, kChannels, false>;
template <class S, class V, int kChannels>
using NormalizedAdjointOp = SimpleGateLoopAdjointOp<S, V, kChannels, true>;

template <auto launch, class F>
void visit_forward(const SimpleGateLoop& p, const F& f) {
  if (p.normalize_input) return visit_real<NormalizedOp, launch, Real>(p, f);
  visit_real<SimpleOp, launch, Real>(p, f);
}

template <class F>
void visit(const SimpleGateLoop& p, const F& f) {
  check("SimpleGateLoop", p, /*complex_allowed=*/false);
  if (is_step(p)) return visit_forward<step_launch>(p, f);
  visit_forward<simple_launch>(p, f);
}
template <class F>
void visit(const SimpleGateLoopBackward& p, const F& f) {
  check("SimpleGateLoopBackward", p, /*complex_allowed=*/false);
  if (p.normalize_input) {
    return visit_real<NormalizedAdjointOp, simple_backward_launch, Real>(p, f);
  }
  visit_real<SimpleAdjointOp, simple_backward_launch, Real>(p, f);
}

}  // namespace gateloop::recurrence::cuda
