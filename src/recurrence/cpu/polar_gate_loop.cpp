// The fused GateLoop read, max heads: polar gate, complex state, real read-out; and its adjoint.
#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/ragged.h"
#include "recurrence/cpu/schedule.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/polar_gate_loop.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/gates-inl.h"
#include "recurrence/cpu/saved_states-inl.h"
#include "recurrence/cpu/sweep-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

// ---------------------------------------------------------------- forward

template <class S>
struct PolarGateLoopStep {
  static constexpr bool kAdjoint = false;
  template <class D>
  using Value = Complex<D>;

  Rows<const S> q, k, v, z;
  Rows<S> y;

  template <class D>
  HWY_INLINE Affine<Complex<D>, Real<D>> Transition(D d, std::int64_t t, std::int64_t c) const {
    return {MakePolarGate(d, Load<Complex<D>>(d, z[t], c)).a,
            Mul(d, Load<Real<D>>(d, k[t], c), Load<Real<D>>(d, v[t], c))};
  }
  template <class How, class D>
  HWY_INLINE void Fetch(D d, std::int64_t t, std::int64_t c) const {
    for (const auto* rows : {&q, &k, &v}) FetchVector<How, Real<D>>(d, *rows, t, c);
    FetchVector<How, Complex<D>>(d, z, t, c);
  }
  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, Complex<D>& state) const {
    const auto step = Transition(d, t, c);
    state = MulAdd(d, step.a, state, step.x);
    Store(d, Mul(d, Load<Real<D>>(d, q[t], c), Real<D>{state.re}), y, t, c);
  }
};

template <class S>
struct PolarGateLoopOp {
  using T = Accumulation<S>;
  template <class D>
  using Value = Complex<D>;

  bool streams;
  View<const S, 1> q, k, v;
  View<const S, 2> z;
  View<S, 1> y;
  Shape shape;
  T* saved_states;

  explicit PolarGateLoopOp(const PolarGateLoop& p)
      : streams(Streams<S>(p.shape, 1)),
        q(p.q, p.shape, p.reverse),
        k(p.k, p.shape, p.reverse),
        v(p.v, p.shape, p.reverse),
        z(p.z, p.shape, p.reverse),
        y(p.y, p.shape, p.reverse, 1, streams),
        shape(p.shape),
        saved_states(static_cast<T*>(p.saved_states)) {}
  PolarGateLoopStep<S> StepAt(const Unit& u) const {
    return {q.At(u), k.At(u), v.At(u), z.At(u), y.At(u)};
  }
  PolarGateLoopStep<S> ReaderAt(const Unit& u) const { return StepAt(u); }
  void Scan(const Unit& u, Steps steps, Carry<T>& state, T*) const {
    SweepSavingStates(StepAt(u), u, steps, shape, state, saved_states,
                      {RowsAhead(u, shape, kPolarGateLoopRowsAhead), shape.time});
  }
};

// ---------------------------------------------------------------- backward

/// h_{t-1} and a in pairs, radial, tangential.
template <class T>
using PolarGateLoopStash = Stash<T, kPolarGateLoopStashPlanes>;

/// The state is recomputed bit for bit as in the forward pass, and with it the gate.
template <class S>
struct PolarGateLoopRecompute {
  using T = Accumulation<S>;
  static constexpr bool kAdjoint = false;
  template <class D>
  using Value = Complex<D>;

  Rows<const S> q, k, v, z, dy;
  PolarGateLoopStash<T> stash;

  template <class How, class D>
  HWY_INLINE void Fetch(D d, std::int64_t t, std::int64_t c) const {
    for (const auto* rows : {&q, &k, &v, &dy}) FetchVector<How, Real<D>>(d, *rows, t, c);
    FetchVector<How, Complex<D>>(d, z, t, c);
  }
  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, Complex<D>& state) const {
    const auto gate = MakePolarGate(d, Load<Complex<D>>(d, z[t], c));
    hn::StoreU(state.re, d, stash.Row(t, 0) + c);
    hn::StoreU(state.im, d, stash.Row(t, 1) + c);
    hn::StoreU(gate.a.re, d, stash.Row(t, 2) + c);
    hn::StoreU(gate.a.im, d, stash.Row(t, 3) + c);
    hn::StoreU(gate.radial, d, stash.Row(t, 4) + c);
    hn::StoreU(gate.tangential, d, stash.Row(t, 5) + c);
    const auto x = Mul(d, Load<Real<D>>(d, k[t], c), Load<Real<D>>(d, v[t], c));
    state = MulAdd(d, gate.a, state, x);
  }
};

/// The carry is conj(a_t) g_t, as in the linear recurrence.
template <class S>
struct PolarGateLoopAdjointStep {
  using T = Accumulation<S>;
  static constexpr bool kAdjoint = true;
  template <class D>
  using Value = Complex<D>;

  Rows<const S> q, k, v, z, dy;
  Rows<S> dq, dk, dv, dz;
  PolarGateLoopStash<T> stash;

  template <class D>
  HWY_INLINE Affine<Complex<D>, Complex<D>> Transition(D d, std::int64_t t, std::int64_t c) const {
    const auto a = Conj(d, MakePolarGate(d, Load<Complex<D>>(d, z[t], c)).a);
    const auto g = Mul(d, Load<Real<D>>(d, q[t], c), LoadOrZero<Real<D>>(d, dy, t, c)).re;
    return {a, {hn::Mul(a.re, g), hn::Mul(a.im, g)}};
  }

  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, Complex<D>& carry) const {
    const Complex<D> before{hn::LoadU(d, stash.Row(t, 0) + c), hn::LoadU(d, stash.Row(t, 1) + c)};
    const Complex<D> a{hn::LoadU(d, stash.Row(t, 2) + c), hn::LoadU(d, stash.Row(t, 3) + c)};
    const auto radial = hn::LoadU(d, stash.Row(t, 4) + c);
    const auto tangential = hn::LoadU(d, stash.Row(t, 5) + c);
    const auto q_t = LoadReal(d, q[t] + c), k_t = LoadReal(d, k[t] + c);
    const auto v_t = LoadReal(d, v[t] + c);
    const auto dy_t = LoadOrZero<Real<D>>(d, dy, t, c).re;

    const auto h_re = MulAdd(d, a, before, Real<D>{hn::Mul(k_t, v_t)}).re;
    const Complex<D> g{hn::MulAdd(q_t, dy_t, carry.re), carry.im};
    Store(d, Real<D>{hn::Mul(dy_t, h_re)}, dq, t, c);
    Store(d, Real<D>{hn::Mul(v_t, g.re)}, dk, t, c);
    Store(d, Real<D>{hn::Mul(k_t, g.re)}, dv, t, c);

    carry = Mul(d, Conj(d, a), g);
    // da conj(a) = g conj(h_{t-1}) conj(a) = carry conj(h_{t-1})
    const auto w = Mul(d, carry, Conj(d, before));
    const Complex<D> polar{hn::Mul(w.re, radial), hn::Mul(w.im, tangential)};
    Store(d, Mul(d, a, polar), dz, t, c);
  }
};

template <class S>
struct PolarGateLoopAdjointOp {
  using T = Accumulation<S>;
  template <class D>
  using Value = Complex<D>;

  bool streams;
  View<const S, 1> q, k, v, dy;
  View<const S, 2> z;
  View<S, 1> dq, dk, dv;
  View<S, 2> dz;
  Shape shape;
  const T* saved_states;

  explicit PolarGateLoopAdjointOp(const PolarGateLoopBackward& p)
      : streams(Streams<S>(p.shape, 5)),
        q(p.q, p.shape, p.reverse),
        k(p.k, p.shape, p.reverse),
        v(p.v, p.shape, p.reverse),
        dy(p.dy, p.shape, p.reverse),
        z(p.z, p.shape, p.reverse),
        dq(p.dq, p.shape, p.reverse, 1, streams),
        dk(p.dk, p.shape, p.reverse, 1, streams),
        dv(p.dv, p.shape, p.reverse, 1, streams),
        dz(p.dz, p.shape, p.reverse, 1, streams),
        shape(p.shape),
        saved_states(static_cast<const T*>(p.saved_states)) {}
  PolarGateLoopAdjointStep<S> StepAt(const Unit& u) const {
    return {q.At(u),  k.At(u),  v.At(u),  z.At(u),  dy.At(u),
            dq.At(u), dk.At(u), dv.At(u), dz.At(u), {}};
  }
  PolarGateLoopRecompute<S> ReaderAt(const Unit& u) const {
    return {q.At(u), k.At(u), v.At(u), z.At(u), (dy.IsNull() ? q : dy).At(u), {}};
  }
  void Scan(const Unit& u, Steps steps, Carry<T>& carry, T* stash) const {
    SweepBack(ReaderAt(u), StepAt(u), u, steps, shape, saved_states, carry, stash);
  }
};

void RunPolarGateLoop(const PolarGateLoop& p, const Problem& problem, const Executor& executor,
                      void* scratch) {
  RunReal<PolarGateLoopOp>(p, problem, executor, scratch);
}
void RunPolarGateLoopBackward(const PolarGateLoopBackward& p, const Problem& problem,
                              const Executor& executor, void* scratch) {
  RunReal<PolarGateLoopAdjointOp>(p, problem, executor, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunPolarGateLoop);
HWY_EXPORT(RunPolarGateLoopBackward);
namespace {

Problem problem_of(const PolarGateLoop& p) {
  return sized_problem("PolarGateLoop", p, /*complex_allowed=*/false, /*carry_parts=*/2);
}

Problem problem_of(const PolarGateLoopBackward& p) {
  Problem problem =
      sized_problem("PolarGateLoopBackward", p, /*complex_allowed=*/false, /*carry_parts=*/2);
  problem.stash_bytes = kSavedStateBlock * kPolarGateLoopStashPlanes * accumulation_bytes(p.dtype);
  return problem;
}

}  // namespace
}  // namespace cpu

std::size_t scratch_bytes(const PolarGateLoop& p, int threads) {
  return cpu::scratch_bytes(p, cpu::problem_of(p), threads);
}
std::size_t scratch_bytes(const PolarGateLoopBackward& p, int threads) {
  return cpu::scratch_bytes(p, cpu::problem_of(p), threads);
}
void run(const PolarGateLoop& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  run_each(p, problem_of, executor, scratch, HWY_DYNAMIC_DISPATCH(RunPolarGateLoop));
}
void run(const PolarGateLoopBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  run_each(p, problem_of, executor, scratch, HWY_DYNAMIC_DISPATCH(RunPolarGateLoopBackward));
}

}  // namespace gateloop::recurrence
#endif
