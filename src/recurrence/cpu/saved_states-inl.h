// States saved at the start of every kSavedStateBlock steps, and the way back from them.
#include "recurrence/cpu/sweep-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_SAVED_STATES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_SAVED_STATES_INL_H_
#undef GATELOOP_RECURRENCE_CPU_SAVED_STATES_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_SAVED_STATES_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// Where the state of this unit before step t lies in (B, saved_state_count(T), D) saved states.
template <template <class> class V>
std::int64_t SavedStateOffset(const Unit& u, const Shape& shape, std::int64_t t) {
  constexpr std::int64_t kParts = V<hn::ScalableTag<float>>::kParts;
  const std::int64_t row = u.batch * saved_state_count(shape.time) + t / kSavedStateBlock;
  return (row * shape.channels + u.channel) * kParts;
}

/// Sweep, saving the state before every block unless `saved_states` is null. steps.begin is the
/// start of a block.
template <class Step, class T>
void SweepSavingStates(const Step& step, const Unit& u, Steps steps, const Shape& shape,
                       Carry<T>& state, T* saved_states, Lookahead ahead) {
  if (saved_states == nullptr) return Sweep(step, steps, u.channels, state, ahead);
  for (std::int64_t t = steps.begin; t < steps.end; t += kSavedStateBlock) {
    state.template To<Step::template Value>(
        u.channels, saved_states + SavedStateOffset<Step::template Value>(u, shape, t));
    Sweep(step, {t, HWY_MIN(t + kSavedStateBlock, steps.end)}, u.channels, state, ahead);
  }
}

/// Calls f(block, state) from the last block to the first, with the state before that block.
template <template <class> class V, class T, class F>
void ForEachSavedStateBack(const Unit& u, Steps steps, const Shape& shape, const T* saved_states,
                           const F& f) {
  Carry<T> state;
  for (std::int64_t i = saved_state_count(steps.end - steps.begin) - 1; i >= 0; --i) {
    const std::int64_t begin = steps.begin + i * kSavedStateBlock;
    state.template From<V>(u.channels, saved_states + SavedStateOffset<V>(u, shape, begin));
    f(Steps{begin, HWY_MIN(begin + kSavedStateBlock, steps.end)}, state);
  }
}

/// While a block is recomputed, what the block before it will read is prefetched: blocks follow one
/// another downwards while each is first read upwards, an order that no hardware prefetcher
/// follows. PolarGateLoopBackward (1, 65536, 512) took 89 ms without and 65 with it.
inline Lookahead BlockBefore(const Shape& shape) { return {-kSavedStateBlock, shape.time}; }

/// Rows of the stash begin on cache lines.
inline std::int64_t StashWidth(const Unit& u) {
  return (u.channels + kCacheLine - 1) / kCacheLine * kCacheLine;
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_SAVED_STATES_INL_H_
