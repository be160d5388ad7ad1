// The adjoint of GateLoop from chunk to chunk.
#include <algorithm>
#include <array>
#include <cstdint>

#include "recurrence/cpu/gate_loop_chunk-inl.h"
#include "recurrence/cpu/gate_loop_memory-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_BACKWARD_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_BACKWARD_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_BACKWARD_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class T_, int kParts, bool kPerKey>
class GateLoopAdjoint : public Chunks<T_, kParts, kPerKey> {
  using Base = Chunks<T_, kParts, kPerKey>;
  using Base::n;
  using typename Base::Place;

 public:
  using typename Base::T;
  using Tiles = BackwardTiles<T>;

  explicit GateLoopAdjoint(const GateLoopBackward& p)
      : Base(p), p_(p), rows_(p, kParts * sizeof(T)) {}

  void Whole(std::int64_t unit, const Tiles& t) const {
    Base::LoadState(p_.dfinal_state, unit, {t.carry[0], t.carry[1]});
    for (std::int64_t i = Base::ChunksOf(unit) - 1; i >= 0; --i) {
      const Place at = Base::PlaceOf(unit, i, /*next=*/i - 1);
      LoadReads(at, t);
      WriteGradients(at, t);
      const ChunkBackward<T, kParts, kPerKey> chunk(n, t, at.steps);
      chunk.Sum();
      for (std::int64_t key = 0; key < n.keys; ++key) {
        Base::AdvanceKey(key, Conjugate(chunk.Last(key)), t.carry, t.sum, t.carry);
      }
    }
    Base::StoreState({t.carry[0], t.carry[1]}, unit, p_.dinitial_state);
  }

  // In parts. states(i) becomes the gradient of the state before chunk i.
  void Sum(std::int64_t unit, std::int64_t i, const Tiles& t, const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i, /*next=*/i + 1);
    const ChunkBackward<T, kParts, kPerKey> chunk(n, t, at.steps);
    LoadReads(at, t);
    chunk.Sum();
    Base::Copy({t.sum[0], t.sum[1]}, states.state(unit, i).data());
    for (std::int64_t k = 0; k < n.keys; ++k) {
      states.product(unit, i, k) = Conjugate(chunk.Last(k));
    }
  }
  void Begin(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::LoadState(p_.dfinal_state, unit, states.state(unit, Base::ChunksOf(unit)));
  }
  void Advance(std::int64_t unit, std::int64_t key, const ChunkStates<T>& states) const {
    for (std::int64_t i = Base::ChunksOf(unit) - 1; i >= 0; --i) {
      const auto before = states.state(unit, i), after = states.state(unit, i + 1);
      Base::AdvanceKey(key, states.product(unit, i, key), after.data(), before.data(),
                       before.data());
    }
  }
  void End(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::StoreState(states.state(unit, 0), unit, p_.dinitial_state);
  }
  void Finish(std::int64_t unit, std::int64_t i, const Tiles& t,
              const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i, /*next=*/i + 1);
    LoadReads(at, t);
    Base::Copy(states.state(unit, i + 1), t.carry);
    WriteGradients(at, t);
  }

 private:
  static std::array<T, 2> Conjugate(std::array<T, 2> a) { return {a[0], -a[1]}; }

  void LoadReads(const Place& at, const Tiles& t) const {
    Base::LoadKeys(rows_.q, at, t.q);
    Base::Load(rows_.dy, at, n.values, t.dy, n.value_stride);
    Base::LoadTransitions(at, t.a);
    ChunkBackward<T, kParts, kPerKey>(n, t, at.steps).Decays();
  }

  /// The gradients of a chunk whose reads and carry are loaded.
  void WriteGradients(const Place& at, const Tiles& t) const {
    Base::LoadKeys(rows_.k, at, t.k);
    Base::Load(rows_.v, at, n.values, t.v, n.value_stride);
    Base::LoadSaved(p_.saved_states, at, t.state);
    ChunkBackward<T, kParts, kPerKey>(n, t, at.steps).Gradients();
    Base::StoreKeys(t.q, t.dq, at, rows_.dq);
    Base::StoreKeys(t.k, t.dk, at, rows_.dk);
    Base::Store(t.dv, n.value_stride, at, n.values, rows_.dv);
    Base::StoreTransitions(t.da, at, rows_.da);
  }

  const GateLoopBackward& p_;
  BackwardRows rows_;
};

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_BACKWARD_INL_H_
