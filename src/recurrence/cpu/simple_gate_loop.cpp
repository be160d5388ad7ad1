// The simple gate loop: sigmoid gate, real state, real read-out; and its adjoint.
#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/ragged.h"
#include "recurrence/cpu/schedule.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/simple_gate_loop.cpp"
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
struct SimpleStep {
  static constexpr bool kAdjoint = false;
  template <class D>
  using Value = Real<D>;

  Rows<const S> q, kv, z;
  Rows<S> y;
  bool normalize;

  template <class D>
  HWY_INLINE Affine<Real<D>, Real<D>> Transition(D d, std::int64_t t, std::int64_t c) const {
    const auto gate = MakeSigmoidGate(d, Load<Real<D>>(d, z[t], c));
    const auto kv_t = Load<Real<D>>(d, kv[t], c);
    return {gate.a, normalize ? Mul(d, gate.rest, kv_t) : kv_t};
  }
  template <class How, class D>
  HWY_INLINE void Fetch(D d, std::int64_t t, std::int64_t c) const {
    for (const auto* rows : {&q, &kv, &z}) FetchVector<How, Real<D>>(d, *rows, t, c);
  }
  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, Real<D>& state) const {
    const auto step = Transition(d, t, c);
    state = MulAdd(d, step.a, state, step.x);
    Store(d, Mul(d, Load<Real<D>>(d, q[t], c), state), y, t, c);
  }
};

template <class S>
struct SimpleOp {
  using T = Accumulation<S>;
  template <class D>
  using Value = Real<D>;

  bool streams;
  View<const S, 1> q, kv, z;
  View<S, 1> y;
  Shape shape;
  T* saved_states;
  bool normalize;

  explicit SimpleOp(const SimpleGateLoop& p)
      : streams(Streams<S>(p.shape, 1)),
        q(p.q, p.shape, p.reverse),
        kv(p.kv, p.shape, p.reverse),
        z(p.z, p.shape, p.reverse),
        y(p.y, p.shape, p.reverse, 1, streams),
        shape(p.shape),
        saved_states(static_cast<T*>(p.saved_states)),
        normalize(p.normalize_input) {}
  SimpleStep<S> StepAt(const Unit& u) const {
    return {q.At(u), kv.At(u), z.At(u), y.At(u), normalize};
  }
  SimpleStep<S> ReaderAt(const Unit& u) const { return StepAt(u); }
  void Scan(const Unit& u, Steps steps, Carry<T>& state, T*) const {
    SweepSavingStates(StepAt(u), u, steps, shape, state, saved_states,
                      {RowsAhead(u, shape, 0), shape.time});
  }
};

// ---------------------------------------------------------------- backward

template <class T>
using SimpleStash = Stash<T, kSimpleStashPlanes>;  // h_{t-1}, a, 1 - a

/// The state is recomputed bit for bit as in the forward pass, and with it the gate.
template <class S>
struct SimpleRecompute {
  using T = Accumulation<S>;
  static constexpr bool kAdjoint = false;
  template <class D>
  using Value = Real<D>;

  Rows<const S> q, kv, z, dy;
  bool normalize;
  SimpleStash<T> stash;

  template <class How, class D>
  HWY_INLINE void Fetch(D d, std::int64_t t, std::int64_t c) const {
    for (const auto* rows : {&q, &kv, &z, &dy}) FetchVector<How, Real<D>>(d, *rows, t, c);
  }
  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, Real<D>& state) const {
    const auto gate = MakeSigmoidGate(d, Load<Real<D>>(d, z[t], c));
    hn::StoreU(state.re, d, stash.Row(t, 0) + c);
    hn::StoreU(gate.a.re, d, stash.Row(t, 1) + c);
    hn::StoreU(gate.rest.re, d, stash.Row(t, 2) + c);
    const auto kv_t = Load<Real<D>>(d, kv[t], c);
    state = MulAdd(d, gate.a, state, normalize ? Mul(d, gate.rest, kv_t) : kv_t);
  }
};

/// The carry is a_t g_t, as in the linear recurrence.
template <class S>
struct SimpleAdjointStep {
  using T = Accumulation<S>;
  static constexpr bool kAdjoint = true;
  template <class D>
  using Value = Real<D>;

  Rows<const S> q, kv, z, dy;
  Rows<S> dq, dkv, dz;
  bool normalize;
  SimpleStash<T> stash;

  template <class D>
  HWY_INLINE Affine<Real<D>, Real<D>> Transition(D d, std::int64_t t, std::int64_t c) const {
    const auto a = MakeSigmoidGate(d, Load<Real<D>>(d, z[t], c)).a;
    const auto g = Mul(d, Load<Real<D>>(d, q[t], c), LoadOrZero<Real<D>>(d, dy, t, c));
    return {a, Mul(d, a, g)};
  }

  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, Real<D>& carry) const {
    const auto before = hn::LoadU(d, stash.Row(t, 0) + c);
    const auto a = hn::LoadU(d, stash.Row(t, 1) + c);
    const auto rest = hn::LoadU(d, stash.Row(t, 2) + c);
    const auto q_t = LoadReal(d, q[t] + c), kv_t = LoadReal(d, kv[t] + c);
    const auto dy_t = LoadOrZero<Real<D>>(d, dy, t, c).re;

    const auto h = hn::MulAdd(a, before, normalize ? hn::Mul(rest, kv_t) : kv_t);
    const auto g = hn::MulAdd(q_t, dy_t, carry.re);
    Store(d, Real<D>{hn::Mul(dy_t, h)}, dq, t, c);
    Store(d, Real<D>{normalize ? hn::Mul(rest, g) : g}, dkv, t, c);
    carry.re = hn::Mul(a, g);
    // da = g (h_{t-1} - kv_t [normalize]), dz = da a (1 - a)
    const auto slope = normalize ? hn::Sub(before, kv_t) : before;
    Store(d, Real<D>{hn::Mul(hn::Mul(carry.re, slope), rest)}, dz, t, c);
  }
};

template <class S>
struct SimpleAdjointOp {
  using T = Accumulation<S>;
  template <class D>
  using Value = Real<D>;

  bool streams;
  View<const S, 1> q, kv, z, dy;
  View<S, 1> dq, dkv, dz;
  Shape shape;
  const T* saved_states;
  bool normalize;

  explicit SimpleAdjointOp(const SimpleGateLoopBackward& p)
      : streams(Streams<S>(p.shape, 3)),
        q(p.q, p.shape, p.reverse),
        kv(p.kv, p.shape, p.reverse),
        z(p.z, p.shape, p.reverse),
        dy(p.dy, p.shape, p.reverse),
        dq(p.dq, p.shape, p.reverse, 1, streams),
        dkv(p.dkv, p.shape, p.reverse, 1, streams),
        dz(p.dz, p.shape, p.reverse, 1, streams),
        shape(p.shape),
        saved_states(static_cast<const T*>(p.saved_states)),
        normalize(p.normalize_input) {}
  SimpleAdjointStep<S> StepAt(const Unit& u) const {
    return {q.At(u), kv.At(u), z.At(u), dy.At(u), dq.At(u), dkv.At(u), dz.At(u), normalize, {}};
  }
  SimpleRecompute<S> ReaderAt(const Unit& u) const {
    return {q.At(u), kv.At(u), z.At(u), (dy.IsNull() ? q : dy).At(u), normalize, {}};
  }
  void Scan(const Unit& u, Steps steps, Carry<T>& carry, T* stash) const {
    SweepBack(ReaderAt(u), StepAt(u), u, steps, shape, saved_states, carry, stash);
  }
};

void RunSimple(const SimpleGateLoop& p, const Problem& problem, const Executor& executor,
               void* scratch) {
  RunReal<SimpleOp>(p, problem, executor, scratch);
}
void RunSimpleBackward(const SimpleGateLoopBackward& p, const Problem& problem,
                       const Executor& executor, void* scratch) {
  RunReal<SimpleAdjointOp>(p, problem, executor, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunSimple);
HWY_EXPORT(RunSimpleBackward);
namespace {

Problem problem_of(const SimpleGateLoop& p) {
  return sized_problem("SimpleGateLoop", p, /*complex_allowed=*/false, /*carry_parts=*/1);
}

Problem problem_of(const SimpleGateLoopBackward& p) {
  Problem problem =
      sized_problem("SimpleGateLoopBackward", p, /*complex_allowed=*/false, /*carry_parts=*/1);
  problem.stash_bytes = kSavedStateBlock * kSimpleStashPlanes * accumulation_bytes(p.dtype);
  return problem;
}

}  // namespace
}  // namespace cpu

std::size_t scratch_bytes(const SimpleGateLoop& p, int threads) {
  return cpu::scratch_bytes(p, cpu::problem_of(p), threads);
}
std::size_t scratch_bytes(const SimpleGateLoopBackward& p, int threads) {
  return cpu::scratch_bytes(p, cpu::problem_of(p), threads);
}
void run(const SimpleGateLoop& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  run_each(p, problem_of, executor, scratch, HWY_DYNAMIC_DISPATCH(RunSimple));
}
void run(const SimpleGateLoopBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  run_each(p, problem_of, executor, scratch, HWY_DYNAMIC_DISPATCH(RunSimpleBackward));
}

}  // namespace gateloop::recurrence
#endif
