#pragma once

/// h_t = a_t h_{t-1} + x_t and its adjoint, as what the scan driver scans.
#include <cstdint>

#include "gateloop/recurrence.h"
#include "recurrence/cuda/plan-inl.h"
#include "recurrence/cuda/scan-inl.h"

namespace gateloop::recurrence::cuda {

template <class S, class V, int kChannels_>
struct LinearOp {
  using Value = V;
  using T = typename V::Scalar;
  static constexpr int kParts = V::kParts, kChannels = kChannels_;
  static constexpr bool kBackwards = false, kSaves = false, kRecomputes = false;
  struct Step {
    Lane<S, kParts * kChannels> a, x;  // as stored: 16-bit numbers take half a register
  };
  using Numbers = Step;

  View<const S, kParts, kChannels> a, x;
  View<S, kParts, kChannels> h;
  View<const T, kParts, kChannels> initial;
  View<T, kParts, kChannels> final_state;
  bool whole;  // all sequences are given and read in whole accesses

  explicit LinearOp(const LinearRecurrence& p) {
    whole = bind(a, p.a, kParts, p.reverse) & bind(x, p.x, kParts, p.reverse) &
            bind(h, p.h, kParts, p.reverse);
    bind_state(initial, p.initial_state, p.shape);
    bind_state(final_state, p.final_state, p.shape);
  }

  template <class Memory, class AnyPlace>
  GATELOOP_HD Numbers load(Memory& memory, const AnyPlace& p, int i) const {
    return {a.load(memory, p, i), x.load(memory, p, i)};
  }
  GATELOOP_HD Step step(const Numbers& numbers) const { return numbers; }
  GATELOOP_HD Affine<V> transition(const Step& step, int c) const {
    return {From<V>::lane(step.a, c), From<V>::lane(step.x, c)};
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void apply(Memory& memory, const AnyPlace& p, int i, const Step& step,
                         V (&state)[kChannels]) const {
    Lane<S, kParts * kChannels> out{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      state[c] = cuda::apply(transition(step, c), state[c]);
      put(state[c], out, c);
    }
    h.store(memory, p, i, out);
  }
};

/// The carry is c_t = conj(a_t) g_t, what the gradient of h_{t-1} receives from later steps; so a
/// step reads nothing of its successor.
template <class S, class V, int kChannels_>
struct LinearAdjointOp {
  using Value = V;
  using T = typename V::Scalar;
  static constexpr int kParts = V::kParts, kChannels = kChannels_;
  static constexpr bool kBackwards = true, kSaves = false, kRecomputes = false;
  struct Step {
    Lane<S, kParts * kChannels> a, dh;
    Lane<S, kParts * kChannels> before;  // h_{t-1}, of step 0 zeros: its is the initial state
  };
  using Numbers = Step;

  View<const S, kParts, kChannels> a, h, dh;
  View<S, kParts, kChannels> da, dx;
  View<const T, kParts, kChannels> initial_h;
  View<const T, kParts, kChannels> initial;  // of the carry: dfinal_state
  View<T, kParts, kChannels> final_state;    // dinitial_state
  bool whole;                                // all sequences are given and read in whole accesses

  explicit LinearAdjointOp(const LinearRecurrenceBackward& p) {
    whole = bind(a, p.a, kParts, p.reverse) & bind(h, p.h, kParts, p.reverse) &
            bind(dh, p.dh, kParts, p.reverse) & bind(da, p.da, kParts, p.reverse) &
            bind(dx, p.dx, kParts, p.reverse);
    bind_state(initial_h, p.initial_state, p.shape);
    bind_state(initial, p.dfinal_state, p.shape);
    bind_state(final_state, p.dinitial_state, p.shape);
  }

  template <class Memory, class AnyPlace>
  GATELOOP_HD Numbers load(Memory& memory, const AnyPlace& p, int i) const {
    // Step 0 is the first of its thread: others need no test.
    const bool first = i == 0 && p.start;
    return {a.load(memory, p, i), dh.load(memory, p, i),
            first ? Lane<S, kParts * kChannels>{} : h.load(memory, p, i - 1)};
  }
  GATELOOP_HD Step step(const Numbers& numbers) const { return numbers; }
  GATELOOP_HD Affine<V> transition(const Step& step, int c) const {
    const V a_t = conj(From<V>::lane(step.a, c));
    return {a_t, mul(a_t, From<V>::lane(step.dh, c))};
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void apply(Memory& memory, const AnyPlace& p, int i, const Step& step,
                         V (&carry)[kChannels]) const {
    V before[kChannels];
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) before[c] = From<V>::lane(step.before, c);
    if (i == 0 && p.start) {
      const auto state = initial_h.load(memory, state_row(p), 0);
      GATELOOP_UNROLL
      for (int c = 0; c < kChannels; ++c) before[c] = From<V>::lane(state, c);
    }
    Lane<S, kParts * kChannels> dx_t{}, da_t{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const V g = add(From<V>::lane(step.dh, c), carry[c]);
      put(g, dx_t, c);
      put(mul(g, conj(before[c])), da_t, c);
      carry[c] = mul(conj(From<V>::lane(step.a, c)), g);
    }
    dx.store(memory, p, i, dx_t);
    da.store(memory, p, i, da_t);
  }
};

// ---------------------------------------------------------------- by dtype

template <template <class, class, int> class Op, auto launch, class Params, class F>
void visit_any(const Params& p, const F& f) {
  if (p.dtype == DType::kComplex64) return visit_as<Op, launch, float, Complex>(p, f);
  if (p.dtype == DType::kComplex128) return visit_as<Op, launch, double, Complex>(p, f);
  visit_real<Op, launch, Real>(p, f);
}

template <class F>
void visit(const LinearRecurrence& p, const F& f) {
  check("LinearRecurrence", p, /*complex_allowed=*/true);
  if (is_step(p)) return visit_any<LinearOp, step_launch>(p, f);
  visit_any<LinearOp, linear_launch>(p, f);
}
template <class F>
void visit(const LinearRecurrenceBackward& p, const F& f) {
  check("LinearRecurrenceBackward", p, /*complex_allowed=*/true);
  visit_any<LinearAdjointOp, linear_backward_launch>(p, f);
}

}  // namespace gateloop::recurrence::cuda
