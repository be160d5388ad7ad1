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

/// What the recomputation of one block of saved states leaves for the sweep back: kPlanes rows a
/// step, of `width` numbers.
template <class T, std::int64_t kPlanes>
struct Stash {
  T* first = nullptr;
  std::int64_t begin = 0, width = 0;
  HWY_INLINE T* Row(std::int64_t t, std::int64_t plane) const {
    return first + ((t - begin) * kPlanes + plane) * width;
  }
};

/// From the last block to the first: `recompute` its states from the saved one, then sweep `back`.
/// Meanwhile what the block before it will read is prefetched: blocks follow one another downwards
/// while each is first read upwards, an order that no hardware prefetcher follows.
/// PolarGateLoopBackward (1, 65536, 512) took 89 ms without and 65 with it.
template <class Recompute, class Back, class T>
void SweepBack(Recompute recompute, Back back, const Unit& u, Steps steps, const Shape& shape,
               const T* saved_states, Carry<T>& carry, T* stash) {
  const std::int64_t width = (u.channels + kCacheLine - 1) / kCacheLine * kCacheLine;
  Carry<T> state;
  for (std::int64_t i = saved_state_count(steps.end - steps.begin) - 1; i >= 0; --i) {
    const std::int64_t begin = steps.begin + i * kSavedStateBlock;
    const Steps block{begin, HWY_MIN(begin + kSavedStateBlock, steps.end)};
    state.template From<Back::template Value>(
        u.channels, saved_states + SavedStateOffset<Back::template Value>(u, shape, begin));
    back.stash = recompute.stash = {stash, begin, width};
    Sweep(recompute, block, u.channels, state, {-kSavedStateBlock, shape.time});
    Sweep(back, block, u.channels, carry);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_SAVED_STATES_INL_H_
