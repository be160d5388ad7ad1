// GateLoop step by step: states move through registers, a block of keys and a vector of values at
// a time.
#include <cstdint>

#include "recurrence/cpu/gate_loop_heads-inl.h"
#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/parallel.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_STEPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_STEPS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_STEPS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_STEPS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// A block of a head's state in registers, and its place in a tile of the state.
template <class Heads>
class StateBlock {
  using T = typename Heads::T;
  using D = typename Heads::D;
  using V = typename Heads::V;
  static constexpr int kParts = Heads::kParts;

 public:
  V parts[kParts][Heads::kKeys];

  HWY_INLINE StateBlock(T* const* tile, std::int64_t at, std::int64_t stride) {
    for (int part = 0; part < kParts; ++part) {
      for (int k = 0; k < Heads::kKeys; ++k) {
        parts[part][k] = hn::LoadU(D(), tile[part] + at + k * stride);
      }
    }
  }
  HWY_INLINE void Store(T* const* tile, std::int64_t at, std::int64_t stride) const {
    for (int part = 0; part < kParts; ++part) {
      for (int k = 0; k < Heads::kKeys; ++k) {
        hn::StoreU(parts[part][k], D(), tile[part] + at + k * stride);
      }
    }
  }
};

/// What both directions do at a step.
template <class Heads>
class Stepwise : public Heads {
 protected:
  using Heads::Heads;
  using typename Heads::T, typename Heads::V;

  /// state = a state + k v at step s, of key i of the block at `key`.
  HWY_INLINE void Advance(const StepTiles<T>& t, std::int64_t s, std::int64_t key, int i, V v,
                          StateBlock<Heads>& state) const {
    const V kv = hn::Mul(Heads::OfKey(t.k + s * Heads::KeyStride() + key, i), v);
    const V a_re = Heads::TransitionOf(t.a[0], s, key + i), re = state.parts[0][i];
    if constexpr (Heads::kParts == 1) {
      state.parts[0][i] = hn::MulAdd(a_re, re, kv);
    } else {
      const V a_im = Heads::TransitionOf(t.a[1], s, key + i), im = state.parts[1][i];
      state.parts[0][i] = hn::MulAdd(a_re, re, hn::NegMulAdd(a_im, im, kv));
      state.parts[1][i] = hn::MulAdd(a_re, im, hn::Mul(a_im, re));
    }
  }
};

template <class Heads>
class StepsForward : public Stepwise<Heads> {
  using typename Heads::D, typename Heads::V, typename Heads::Place;
  using Block = StateBlock<Heads>;
  static constexpr int kParts = Heads::kParts;

 public:
  using typename Heads::T;

  explicit StepsForward(const GateLoop& p) : Stepwise<Heads>(p), p_(p), rows_(p) {}

  void Whole(std::int64_t unit, const StepTiles<T>& t) const {
    Heads::LoadState(p_.initial_state, unit, t.state);
    for (std::int64_t i = 0; i < Heads::ChunksOf(unit); ++i) {
      const Place at = Heads::PlaceOf(unit, i, /*next=*/i + 1);
      if (p_.saved_states != nullptr) Heads::StoreSaved(t.state, at, p_.saved_states);
      Heads::LoadKeys(rows_.q, at, t.q);
      Heads::LoadKeys(rows_.k, at, t.k);
      Heads::LoadValues(rows_.v, at, t.v);
      Heads::LoadTransitions(at, t.a);
      Heads::ForEachBlock([&](auto key, auto value) { Steps(t, at.steps, key, value); });
      Heads::StoreValues(t.y, at, rows_.y);
    }
    Heads::StoreState(t.state, unit, p_.final_state);
  }

 private:
  /// Of the block at `key` and `value`; adds its part of the output to that of earlier keys.
  void Steps(const StepTiles<T>& t, std::int64_t steps, std::int64_t key,
             std::int64_t value) const {
    const D d;
    const std::int64_t stride = Heads::ValueStride(), at = key * stride + value;
    Block state(t.state, at, stride);
    for (std::int64_t s = 0; s < steps; ++s) {
      const T* const q = t.q + s * Heads::KeyStride() + key;
      const V v = hn::LoadU(d, t.v + s * stride + value);
      T* const y = t.y + s * stride + value;
      V sum = key == 0 ? hn::Zero(d) : hn::LoadU(d, y);
      for (int i = 0; i < Heads::kKeys; ++i) {
        Stepwise<Heads>::Advance(t, s, key, i, v, state);
        sum = hn::MulAdd(Heads::OfKey(q, i), state.parts[0][i], sum);
      }
      hn::StoreU(sum, d, y);
    }
    state.Store(t.state, at, stride);
  }

  const GateLoop& p_;
  ForwardRows rows_;
};

template <class Heads>
class StepsBackward : public Stepwise<Heads> {
  using typename Heads::D, typename Heads::V, typename Heads::Place;
  using Block = StateBlock<Heads>;
  static constexpr int kParts = Heads::kParts, kKeys = Heads::kKeys;

 public:
  using typename Heads::T;

  explicit StepsBackward(const GateLoopBackward& p)
      : Stepwise<Heads>(p), p_(p), rows_(p, kParts * sizeof(T)) {}

  void Whole(std::int64_t unit, const StepTiles<T>& t) const {
    Heads::LoadState(p_.dfinal_state, unit, t.carry);
    for (std::int64_t i = Heads::ChunksOf(unit) - 1; i >= 0; --i) {
      const Place at = Heads::PlaceOf(unit, i, /*next=*/i - 1);
      Heads::LoadKeys(rows_.q, at, t.q);
      Heads::LoadKeys(rows_.k, at, t.k);
      Heads::LoadValues(rows_.v, at, t.v);
      Heads::LoadValues(rows_.dy, at, t.dy);
      Heads::LoadTransitions(at, t.a);
      Heads::LoadSaved(p_.saved_states, at, t.state);
      if constexpr (!Heads::kIsOneBlock) Clear(t, at.steps);
      Heads::ForEachBlock([&](auto key, auto value) {
        Recompute(t, at.steps, key, value);
        Steps(t, at.steps, key, value);
      });
      if constexpr (!Heads::kPerKey) {
        for (std::int64_t s = 0; s < at.steps; ++s) {
          for (int part = 0; part < kParts; ++part) {
            Heads::PutTransition(hn::LoadU(D(), Lanes(t, s, part)), s, t.da[part]);
          }
        }
      }
      Heads::StoreKeys(t.q, t.dq, at, rows_.dq);
      Heads::StoreKeys(t.k, t.dk, at, rows_.dk);
      Heads::StoreValues(t.dv, at, rows_.dv);
      Heads::StoreTransitions(t.da, at, rows_.da);
    }
    Heads::StoreState(t.carry, unit, p_.dinitial_state);
  }

 private:
  static_assert(kKeys <= kStepBlockKeys);

  /// A part of a block's state before step s.
  static HWY_INLINE T* Stash(const StepTiles<T>& t, std::int64_t s, int part) {
    return t.stash + (s * kParts + part) * kKeys * kTileColumns;
  }
  static HWY_INLINE V Stashed(const StepTiles<T>& t, std::int64_t s, int part, int key) {
    return hn::LoadU(D(), Stash(t, s, part) + key * kTileColumns);
  }
  /// The gradient of a step's transition, to be summed over the lanes.
  static T* Lanes(const StepTiles<T>& t, std::int64_t s, int part) {
    return t.da_lanes + (s * kParts + part) * kTileColumns;
  }

  /// What blocks add to.
  void Clear(const StepTiles<T>& t, std::int64_t steps) const {
    std::fill_n(t.dq, steps * Heads::KeyStride(), T(0));
    std::fill_n(t.dk, steps * Heads::KeyStride(), T(0));
    std::fill_n(t.dv, steps * Heads::ValueStride(), T(0));
    if constexpr (Heads::kPerKey) {
      for (int part = 0; part < kParts; ++part) {
        std::fill_n(t.da[part], steps * Heads::KeyStride(), T(0));
      }
    } else {
      std::fill_n(t.da_lanes, steps * kParts * kTileColumns, T(0));
    }
  }
  /// Stores x, added to what earlier blocks left where a head has several.
  static HWY_INLINE void Put(V x, T* to) {
    if constexpr (!Heads::kIsOneBlock) x = hn::Add(x, hn::LoadU(D(), to));
    hn::StoreU(x, D(), to);
  }

  /// A block's state before each step and after the last.
  void Recompute(const StepTiles<T>& t, std::int64_t steps, std::int64_t key,
                 std::int64_t value) const {
    const std::int64_t stride = Heads::ValueStride();
    Block state(t.state, key * stride + value, stride);
    for (std::int64_t s = 0;; ++s) {
      T* const parts[] = {Stash(t, s, 0), Stash(t, s, kParts - 1)};
      state.Store(parts, 0, kTileColumns);
      if (s == steps) return;
      const V v = hn::LoadU(D(), t.v + s * stride + value);
      for (int i = 0; i < kKeys; ++i) {
        Stepwise<Heads>::Advance(t, s, key, i, v, state);
      }
    }
  }

  /// The carry is the gradient of a block's state after the chunk, then of that before it.
  void Steps(const StepTiles<T>& t, std::int64_t steps, std::int64_t key,
             std::int64_t value) const {
    const D d;
    const std::int64_t stride = Heads::ValueStride(), at = key * stride + value;
    Block carry(t.carry, at, stride);
    for (std::int64_t s = steps - 1; s >= 0; --s) {
      const std::int64_t key_row = s * Heads::KeyStride() + key, value_row = s * stride + value;
      const V v = hn::LoadU(d, t.v + value_row), dy = hn::LoadU(d, t.dy + value_row);
      V dv = hn::Zero(d), dq[kKeys], dk[kKeys];
      V da_re[kKeys], da_im[kKeys];  // of the head's one transition all in the first
      for (int i = 0; i < kKeys; ++i) {
        const V a_re = Heads::TransitionOf(t.a[0], s, key + i);
        const V g_re = hn::MulAdd(Heads::OfKey(t.q + key_row, i), dy, carry.parts[0][i]);
        const V h_re = Stashed(t, s, 0, i);
        dq[i] = hn::Mul(dy, Stashed(t, s + 1, 0, i));
        dk[i] = hn::Mul(v, g_re);
        dv = hn::MulAdd(Heads::OfKey(t.k + key_row, i), g_re, dv);
        const int to = Heads::kPerKey ? i : 0;
        const bool is_first = Heads::kPerKey || i == 0;
        da_re[to] = is_first ? hn::Mul(g_re, h_re) : hn::MulAdd(g_re, h_re, da_re[to]);
        if constexpr (kParts == 1) {
          carry.parts[0][i] = hn::Mul(a_re, g_re);
        } else {
          const V a_im = Heads::TransitionOf(t.a[1], s, key + i);
          const V g_im = carry.parts[1][i], h_im = Stashed(t, s, 1, i);
          da_re[to] = hn::MulAdd(g_im, h_im, da_re[to]);
          const V of_re = hn::Mul(g_re, h_im);
          da_im[to] = is_first ? hn::MulSub(g_im, h_re, of_re)
                               : hn::MulAdd(g_im, h_re, hn::Sub(da_im[to], of_re));
          carry.parts[0][i] = hn::MulAdd(a_re, g_re, hn::Mul(a_im, g_im));
          carry.parts[1][i] = hn::MulSub(a_re, g_im, hn::Mul(a_im, g_re));
        }
      }
      Put(dv, t.dv + value_row);
      Heads::PutSums(dq, t.dq + key_row);
      Heads::PutSums(dk, t.dk + key_row);
      if constexpr (Heads::kPerKey) {
        Heads::PutSums(da_re, t.da[0] + key_row);
        if constexpr (kParts == 2) Heads::PutSums(da_im, t.da[1] + key_row);
      } else {
        Put(da_re[0], Lanes(t, s, 0));
        if constexpr (kParts == 2) Put(da_im[0], Lanes(t, s, 1));
      }
    }
    carry.Store(t.carry, at, stride);
  }

  const GateLoopBackward& p_;
  BackwardRows rows_;
};

/// Threads share sequences and heads. Time is not cut, so that the bits of a sequence depend on it
/// alone.
template <template <class> class Op, class T, int kParts, bool kPerKey, class Params>
void RunSteps(const Params& p, const TileSizes& n, int slots, const Executor& executor,
              void* scratch) {
  const auto run = [&]<class Heads>() {
    const Op<Heads> op(p);
    parallel(executor, slots, op.Units(), [&](std::int64_t unit, std::int64_t slot) {
      op.Whole(unit, tiles_of<StepTiles<T>>(slot, n, scratch));
    });
  };
#if HWY_TARGET != HWY_SCALAR
  const auto run_shared = [&]<int kWidth>() {
    if constexpr (StepVectors<T>::kLanes >= 2 * kWidth) {
      if (can_share_vectors(p, kWidth)) {
        run.template operator()<SharedHeads<T, kParts, kPerKey, kWidth>>();
        return true;
      }
    }
    return false;
  };
  if (run_shared.template operator()<2>() || run_shared.template operator()<4>() ||
      run_shared.template operator()<8>()) {
    return;
  }
#endif
  run.template operator()<OneHead<T, kParts, kPerKey>>();
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_STEPS_INL_H_
