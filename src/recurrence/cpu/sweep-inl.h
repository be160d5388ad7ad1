// Moving a carry through time: typed views of sequences, and the loops that every operation shares.
#include <hwy/cache_control.h>

#include <cstddef>
#include <cstdint>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/schedule.h"
#include "recurrence/cpu/target.h"
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_SWEEP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_SWEEP_INL_H_
#undef GATELOOP_RECURRENCE_CPU_SWEEP_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_SWEEP_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

// ---------------------------------------------------------------- views

/// The rows of one batch entry from one channel on, in the order of the forward scan.
template <class S>
struct Rows {
  S* first;
  std::int64_t stride;
  bool stream = false;  // rows are aligned and written past the cache
  HWY_INLINE S* operator[](std::int64_t t) const { return first + t * stride; }
};

/// A (B, T, D) sequence of S (of pairs of S if kParts is 2). It is turned around if the scan is
/// reversed: the one place that reads `reverse`. `unit` is the number of S that strides count. With
/// `stream` writes bypass the cache where every vector of every row is aligned.
template <class S, std::int64_t kParts>
class View {
 public:
  template <class Any>
  View(const Any& sequence, const Shape& shape, bool reverse, std::int64_t unit = 1,
       bool stream = false)
      : data_(static_cast<S*>(sequence.data)),
        batch_stride_(sequence.batch_stride * unit),
        time_stride_(sequence.time_stride * unit) {
    const auto aligned = [](std::int64_t elements) {
      return elements * static_cast<std::int64_t>(sizeof(S)) % kCacheLine == 0;
    };
    stream_ = stream && reinterpret_cast<std::uintptr_t>(data_) % kCacheLine == 0 &&
              aligned(batch_stride_) && aligned(time_stride_);
    if (reverse && data_ != nullptr && shape.time > 0) {
      data_ += (shape.time - 1) * time_stride_;
      time_stride_ = -time_stride_;
    }
  }

  bool IsNull() const { return data_ == nullptr; }
  Rows<S> At(const Unit& unit) const {
    if (IsNull()) return {nullptr, 0};
    return {data_ + unit.batch * batch_stride_ + unit.channel * kParts, time_stride_, stream_};
  }

 private:
  S* data_;
  std::int64_t batch_stride_, time_stride_;
  bool stream_ = false;
};

/// `parts`: reals that all outputs of one channel and step take.
template <class S>
bool Streams(const Shape& shape, std::int64_t parts) {
  const std::int64_t reals = shape.batch * shape.time * shape.channels * parts;
  return bypasses_cache(reals * static_cast<std::int64_t>(sizeof(S)));
}

/// A null row reads as zeros.
template <class V, class D, class S>
HWY_INLINE V LoadOrZero(D d, const Rows<S>& rows, std::int64_t t, std::int64_t c) {
  return rows.first == nullptr ? Zeros<V>(d) : Load<V>(d, rows[t], c);
}
/// Two ways to fetch a cache line: without waiting for it, or as an ordinary read. The hardware
/// prefetchers of a Zen 4 follow reads; they ignore prefetch instructions.
struct Prefetch {
  static HWY_INLINE void Line(const void* p) { hwy::Prefetch(p); }
};
struct Touch {
  static HWY_INLINE void Line(const void* p) {
    static_cast<void>(*static_cast<const volatile std::byte*>(p));
  }
};

/// Fetches the cache lines of one vector of V.
template <class How, class V, class D, class S>
HWY_INLINE void FetchVector(D d, const Rows<S>& rows, std::int64_t t, std::int64_t c) {
  const S* p = rows[t] + c * V::kParts;
  How::Line(p);
  if constexpr (V::kParts == 2) How::Line(p + hn::MaxLanes(d));
}

template <class D, class V, class S>
HWY_INLINE void Store(D d, V v, const Rows<S>& rows, std::int64_t t, std::int64_t c) {
  Store(d, v, rows[t], c, rows.stream);
}

// ---------------------------------------------------------------- loops

/// The carry of a tile while it is swept: (re, im) planes in L1. Outside, in states and
/// saved states, it is interleaved.
template <class T>
struct Carry {
  static constexpr std::int64_t kPlane = kTileCarryBytes / 2 / static_cast<std::int64_t>(sizeof(T));
  alignas(kCacheLine) T row[2 * kPlane];

  template <class V, class D>
  HWY_INLINE V Load(D d, std::int64_t c) const {
    return LoadPlanar<V>(d, row, kPlane, c);
  }
  template <class V, class D>
  HWY_INLINE void Store(D d, V v, std::int64_t c) {
    StorePlanar(d, v, row, kPlane, c);
  }
  template <template <class> class V>
  void From(std::int64_t channels, const T* interleaved) {
    ForEachVector<T>(channels, [&](auto d, std::int64_t c) HWY_ATTR {
      Store(d, HWY_NAMESPACE::Load<V<decltype(d)>>(d, interleaved, c), c);
    });
  }
  template <template <class> class V>
  void To(std::int64_t channels, T* interleaved) const {
    ForEachVector<T>(channels, [&](auto d, std::int64_t c) HWY_ATTR {
      HWY_NAMESPACE::Store(d, Load<V<decltype(d)>>(d, c), interleaved, c);
    });
  }
};

/// How far to prefetch: `rows` later in time, earlier if negative, none if 0, within a sequence of
/// `time` steps: at the end of a block cut in time the next one follows.
struct Lookahead {
  std::int64_t rows, time;
};

/// kTileRowsAhead in a tile narrower than the row, where memory is read with gaps, else `whole`.
inline std::int64_t RowsAhead(const Unit& u, const Shape& shape, std::int64_t whole) {
  return u.channels < shape.channels ? kTileRowsAhead : whole;
}

/// The step that the carry passes after `i` others.
template <bool kAdjoint>
HWY_INLINE std::int64_t StepAfter(Steps steps, std::int64_t i) {
  return kAdjoint ? steps.end - 1 - i : steps.begin + i;
}

/// Moves the carry through these steps, from the last to the first if Step::kAdjoint: row by row,
/// so that memory is read in the order it lies.
template <class Step, class T>
void Sweep(const Step& shared, Steps steps, std::int64_t channels, Carry<T>& carry,
           Lookahead ahead = {0, 0}) {
  const Step step = shared;  // a local copy stays in registers across the stores of outputs
  const std::int64_t count = steps.end - steps.begin;
  const auto at = [&](std::int64_t i) { return StepAfter<Step::kAdjoint>(steps, i); };
  const auto later = [&](std::int64_t t) {
    const std::int64_t next = t + ahead.rows;
    return next >= 0 && next < ahead.time ? next : t;
  };
  if (channels <= static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()))) {
    // In a register: to store and load the carry again takes some 10 cycles a step.
    ForEachVector<T>(channels, [&](auto d, std::int64_t c) HWY_ATTR {
      auto value = carry.template Load<typename Step::template Value<decltype(d)>>(d, c);
      for (std::int64_t i = 0; i < count; ++i) {
        if constexpr (requires { step.template Fetch<Prefetch>(d, i, c); }) {
          step.template Fetch<Prefetch>(d, later(at(i)), c);
        }
        step(d, at(i), c, value);
      }
      carry.Store(d, value, c);
    });
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t t = at(i), next = later(t);
    ForEachVector<T, Step::kAdjoint>(channels, [&](auto d, std::int64_t c) HWY_ATTR {
      auto value = carry.template Load<typename Step::template Value<decltype(d)>>(d, c);
      // Vector by vector: whole rows at a time stall until earlier prefetches are served.
      if constexpr (requires { step.template Fetch<Prefetch>(d, next, c); }) {
        step.template Fetch<Prefetch>(d, next, c);
      }
      step(d, t, c, value);
      carry.Store(d, value, c);
    });
  }
}

/// These steps as one: c' = product c + sum.
template <class Step, class T>
void Aggregate(const Step& shared, Steps steps, std::int64_t channels, T* product, T* sum) {
  const Step step = shared;
  ForEachVector<T>(channels, [&](auto d, std::int64_t c) HWY_ATTR {
    using V = typename Step::template Value<decltype(d)>;
    V a = Ones<V>(d), x = Zeros<V>(d);
    for (std::int64_t i = 0; i < steps.end - steps.begin; ++i) {
      const auto one = step.Transition(d, StepAfter<Step::kAdjoint>(steps, i), c);
      x = MulAdd(d, one.a, x, one.x);
      a = Mul(d, one.a, a);
    }
    Store(d, a, product, c);
    Store(d, x, sum, c);
  });
}

/// One step of a carry: c' = a c + x.
template <class A, class X>
struct Affine {
  A a;
  X x;
};

/// An operation behind the scheduler's interface. Op offers
///   T, Value<D>                       the accumulation type, a vector of the carry
///   Scan(unit, steps, carry, stash)   the work
///   streams                           whether outputs bypass the cache
///   StepAt(unit)                      a step with Transition(d, t, c)
///   ReaderAt(unit)                    a step with Fetch<how>(d, t, c) of all that Scan reads
template <class Op>
class KernelOf final : public Kernel {
 public:
  using T = typename Op::T;
  explicit KernelOf(const Op& op) : op_(op) {}

  void scan(const Unit& unit, Steps steps, void* carry, void* stash) const override {
    Carry<T> planar;
    planar.template From<Op::template Value>(unit.channels, static_cast<const T*>(carry));
    op_.Scan(unit, steps, planar, static_cast<T*>(stash));
    planar.template To<Op::template Value>(unit.channels, static_cast<T*>(carry));
    if (op_.streams) hwy::FlushStream();
  }
  void touch(const Unit& unit, Steps steps) const override {
    constexpr bool kDown = decltype(op_.StepAt(unit))::kAdjoint;
    const auto reader = op_.ReaderAt(unit);
    for (std::int64_t i = 0; i < steps.end - steps.begin; ++i) {
      const std::int64_t t = StepAfter<kDown>(steps, i);
      ForEachVector<T, kDown>(unit.channels, [&](auto d, std::int64_t c) HWY_ATTR {
        reader.template Fetch<Touch>(d, t, c);
      });
    }
  }
  void aggregate(const Unit& unit, Steps steps, void* product, void* sum) const override {
    Aggregate(op_.StepAt(unit), steps, unit.channels, static_cast<T*>(product),
              static_cast<T*>(sum));
  }
  void combine(std::int64_t channels, const void* product, const void* sum,
               void* carry) const override {
    ForEachVector<T>(channels, [&](auto d, std::int64_t c) HWY_ATTR {
      using V = typename Op::template Value<decltype(d)>;
      T* to = static_cast<T*>(carry);
      Store(d,
            MulAdd(d, Load<V>(d, static_cast<const T*>(product), c), Load<V>(d, to, c),
                   Load<V>(d, static_cast<const T*>(sum), c)),
            to, c);
    });
  }

 private:
  Op op_;
};

/// Runs Op<S> with S the real storage type of the parameters.
template <template <class> class Op, class Params>
void RunReal(const Params& p, const Problem& problem, const Executor& executor, void* scratch) {
  WithStorageOf(p.dtype, [&]<class S>() { drive(problem, KernelOf(Op<S>(p)), executor, scratch); });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_SWEEP_INL_H_
