// h_t = a_t h_{t-1} + x_t and its adjoint, real and complex.
#include "gateloop/recurrence.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/ragged.h"
#include "recurrence/cpu/schedule.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/linear_recurrence.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/sweep-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class S, template <class> class V>
struct LinearStep {
  static constexpr bool kAdjoint = false;
  template <class D>
  using Value = V<D>;

  Rows<const S> a, x;
  Rows<S> h;

  template <class D>
  HWY_INLINE Affine<V<D>, V<D>> Transition(D d, std::int64_t t, std::int64_t c) const {
    return {Load<V<D>>(d, a[t], c), Load<V<D>>(d, x[t], c)};
  }
  template <class How, class D>
  HWY_INLINE void Fetch(D d, std::int64_t t, std::int64_t c) const {
    for (const auto* rows : {&a, &x}) FetchVector<How, V<D>>(d, *rows, t, c);
  }
  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, V<D>& state) const {
    const auto step = Transition(d, t, c);
    state = MulAdd(d, step.a, state, step.x);
    Store(d, state, h, t, c);
  }
};

template <class S, template <class> class V>
struct LinearOp {
  using T = Accumulation<S>;
  template <class D>
  using Value = V<D>;
  static constexpr std::int64_t kParts = V<hn::ScalableTag<T>>::kParts;

  bool streams;
  View<const S, kParts> a, x;
  View<S, kParts> h;
  Shape shape;

  explicit LinearOp(const LinearRecurrence& p)
      : streams(Streams<S>(p.shape, kParts)),
        a(p.a, p.shape, p.reverse, kParts),
        x(p.x, p.shape, p.reverse, kParts),
        h(p.h, p.shape, p.reverse, kParts, streams),
        shape(p.shape) {}
  LinearStep<S, V> StepAt(const Unit& u) const { return {a.At(u), x.At(u), h.At(u)}; }
  LinearStep<S, V> ReaderAt(const Unit& u) const { return StepAt(u); }
  void Scan(const Unit& u, Steps steps, Carry<T>& state, T*) const {
    Sweep(StepAt(u), steps, u.channels, state, {RowsAhead(u, shape, 0), shape.time});
  }
};

/// The carry is c_t = conj(a_t) g_t, what the gradient of h_{t-1} receives from later steps; so a
/// step reads nothing of its successor.
template <class S, template <class> class V>
struct LinearAdjointStep {
  using T = Accumulation<S>;
  static constexpr bool kAdjoint = true;
  template <class D>
  using Value = V<D>;

  Rows<const S> a, h, dh;
  Rows<S> da, dx;
  const T* initial;  // (D) state before step 0, or null

  template <class D>
  HWY_INLINE Affine<V<D>, V<D>> Transition(D d, std::int64_t t, std::int64_t c) const {
    const V<D> conj = Conj(d, Load<V<D>>(d, a[t], c));
    return {conj, Mul(d, conj, LoadOrZero<V<D>>(d, dh, t, c))};
  }
  template <class How, class D>
  HWY_INLINE void Fetch(D d, std::int64_t t, std::int64_t c) const {
    for (const auto* rows : {&a, &h, dh.first == nullptr ? &a : &dh})
      FetchVector<How, V<D>>(d, *rows, t, c);
  }
  template <class D>
  HWY_INLINE V<D> Previous(D d, std::int64_t t, std::int64_t c) const {
    if (HWY_LIKELY(t > 0)) return Load<V<D>>(d, h[t - 1], c);
    return initial == nullptr ? Zeros<V<D>>(d) : Load<V<D>>(d, initial, c);
  }
  template <class D>
  HWY_INLINE void operator()(D d, std::int64_t t, std::int64_t c, V<D>& carry) const {
    const V<D> g = Add(d, LoadOrZero<V<D>>(d, dh, t, c), carry);
    Store(d, g, dx, t, c);
    Store(d, Mul(d, g, Conj(d, Previous(d, t, c))), da, t, c);
    carry = Mul(d, Conj(d, Load<V<D>>(d, a[t], c)), g);
  }
};

template <class S, template <class> class V>
struct LinearAdjointOp {
  using T = Accumulation<S>;
  template <class D>
  using Value = V<D>;
  static constexpr std::int64_t kParts = V<hn::ScalableTag<T>>::kParts;

  bool streams;
  View<const S, kParts> a, h, dh;
  View<S, kParts> da, dx;
  const T* initial;
  Shape shape;

  explicit LinearAdjointOp(const LinearRecurrenceBackward& p)
      : streams(Streams<S>(p.shape, 2 * kParts)),
        a(p.a, p.shape, p.reverse, kParts),
        h(p.h, p.shape, p.reverse, kParts),
        dh(p.dh, p.shape, p.reverse, kParts),
        da(p.da, p.shape, p.reverse, kParts, streams),
        dx(p.dx, p.shape, p.reverse, kParts, streams),
        initial(static_cast<const T*>(p.initial_state)),
        shape(p.shape) {}
  LinearAdjointStep<S, V> StepAt(const Unit& u) const {
    const T* row =
        initial == nullptr ? nullptr : initial + (u.batch * shape.channels + u.channel) * kParts;
    return {a.At(u), h.At(u), dh.At(u), da.At(u), dx.At(u), row};
  }
  LinearAdjointStep<S, V> ReaderAt(const Unit& u) const { return StepAt(u); }
  void Scan(const Unit& u, Steps steps, Carry<T>& carry, T*) const {
    Sweep(StepAt(u), steps, u.channels, carry, {-RowsAhead(u, shape, 0), shape.time});
  }
};

template <class S>
using RealLinearOp = LinearOp<S, Real>;
template <class S>
using RealLinearAdjointOp = LinearAdjointOp<S, Real>;

template <template <class> class RealOp, template <class, template <class> class> class Op,
          class Params>
void RunAny(const Params& p, const Problem& problem, const Executor& executor, void* scratch) {
  if (p.dtype == DType::kComplex64) {
    drive(problem, KernelOf(Op<float, Complex>(p)), executor, scratch);
  } else if (p.dtype == DType::kComplex128) {
    drive(problem, KernelOf(Op<double, Complex>(p)), executor, scratch);
  } else {
    RunReal<RealOp>(p, problem, executor, scratch);
  }
}

void RunLinear(const LinearRecurrence& p, const Problem& problem, const Executor& executor,
               void* scratch) {
  RunAny<RealLinearOp, LinearOp>(p, problem, executor, scratch);
}
void RunLinearBackward(const LinearRecurrenceBackward& p, const Problem& problem,
                       const Executor& executor, void* scratch) {
  RunAny<RealLinearAdjointOp, LinearAdjointOp>(p, problem, executor, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunLinear);
HWY_EXPORT(RunLinearBackward);
namespace {

Problem problem_of(const LinearRecurrence& p) {
  return sized_problem("LinearRecurrence", p, /*complex_allowed=*/true,
                       is_complex(p.dtype) ? 2 : 1);
}

Problem problem_of(const LinearRecurrenceBackward& p) {
  Problem problem = sized_problem("LinearRecurrenceBackward", p, /*complex_allowed=*/true,
                                  is_complex(p.dtype) ? 2 : 1);
  problem.downwards = !p.reverse;
  return problem;
}

}  // namespace
}  // namespace cpu

std::size_t scratch_bytes(const LinearRecurrence& p, int threads) {
  return cpu::scratch_bytes(p, cpu::problem_of(p), threads);
}
std::size_t scratch_bytes(const LinearRecurrenceBackward& p, int threads) {
  return cpu::scratch_bytes(p, cpu::problem_of(p), threads);
}
void run(const LinearRecurrence& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  run_each(p, problem_of, executor, scratch, HWY_DYNAMIC_DISPATCH(RunLinear));
}
void run(const LinearRecurrenceBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  run_each(p, problem_of, executor, scratch, HWY_DYNAMIC_DISPATCH(RunLinearBackward));
}

}  // namespace gateloop::recurrence
#endif
