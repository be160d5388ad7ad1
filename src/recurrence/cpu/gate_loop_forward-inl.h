// GateLoop from chunk to chunk.
#include <algorithm>
#include <array>
#include <cstdint>

#include "recurrence/cpu/gate_loop_chunk-inl.h"
#include "recurrence/cpu/gate_loop_memory-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_FORWARD_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_FORWARD_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_FORWARD_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class T_, int kParts, bool kPerKey>
class GateLoopForward : public Chunks<T_, kParts, kPerKey> {
  using Base = Chunks<T_, kParts, kPerKey>;
  using Base::n;
  using typename Base::Place;

 public:
  using typename Base::T;
  using Tiles = ForwardTiles<T>;

  explicit GateLoopForward(const GateLoop& p) : Base(p), p_(p), rows_(p) {}

  /// A unit from its first step to its last.
  void Whole(std::int64_t unit, const Tiles& t) const {
    Base::LoadState(p_.initial_state, unit, {t.state[0], t.state[1]});
    for (std::int64_t i = 0; i < Base::ChunksOf(unit); ++i) {
      const Place at = Base::PlaceOf(unit, i, /*next=*/i + 1);
      const ChunkForward<T, kParts, kPerKey> chunk(n, t, at.steps);
      LoadSources(at, t);
      Read(at, t);
      chunk.Sum();
      for (std::int64_t key = 0; key < n.keys; ++key) {
        Base::AdvanceKey(key, chunk.Last(key), t.state, t.sum, t.state);
      }
    }
    Base::StoreState({t.state[0], t.state[1]}, unit, p_.final_state);
  }

  // In parts. A chunk's own state is put where the state after it belongs.
  void Sum(std::int64_t unit, std::int64_t i, const Tiles& t, const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i, /*next=*/i + 1);
    const ChunkForward<T, kParts, kPerKey> chunk(n, t, at.steps);
    LoadSources(at, t);
    chunk.Sum();
    Base::Copy({t.sum[0], t.sum[1]}, states.state(unit, i + 1).data());
    for (std::int64_t k = 0; k < n.keys; ++k) states.product(unit, i, k) = chunk.Last(k);
  }
  void Begin(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::LoadState(p_.initial_state, unit, states.state(unit, 0));
  }
  void Advance(std::int64_t unit, std::int64_t key, const ChunkStates<T>& states) const {
    for (std::int64_t i = 0; i < Base::ChunksOf(unit); ++i) {
      const auto before = states.state(unit, i), after = states.state(unit, i + 1);
      Base::AdvanceKey(key, states.product(unit, i, key), before.data(), after.data(),
                       after.data());
    }
  }
  void End(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::StoreState(states.state(unit, Base::ChunksOf(unit)), unit, p_.final_state);
  }
  void Finish(std::int64_t unit, std::int64_t i, const Tiles& t,
              const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i, /*next=*/i + 1);
    LoadSources(at, t);
    Base::Copy(states.state(unit, i), t.state);
    Read(at, t);
  }

 private:
  void LoadSources(const Place& at, const Tiles& t) const {
    Base::LoadKeys(rows_.k, at, t.k);
    Base::Load(rows_.v, at, n.values, t.v, n.value_stride);
    Base::LoadTransitions(at, t.a);
    ChunkForward<T, kParts, kPerKey>(n, t, at.steps).Decays();
  }

  /// The output of a chunk whose sources and state are loaded.
  void Read(const Place& at, const Tiles& t) const {
    Base::LoadKeys(rows_.q, at, t.q);
    const bool has_state = !at.begins || p_.initial_state != nullptr;
    ChunkForward<T, kParts, kPerKey>(n, t, at.steps).Output(has_state);
    Base::Store(t.y, n.value_stride, at, n.values, rows_.y);
    if (p_.saved_states != nullptr) Base::StoreSaved(t.state, at, p_.saved_states);
  }

  const GateLoop& p_;
  ForwardRows rows_;
};

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_FORWARD_INL_H_
