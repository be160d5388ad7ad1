// States saved at the start of every kCheckpointBlock steps, and the way back from them.
#include <cstring>

#include "recurrence/cpu/sweep-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_CHECKPOINTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_CHECKPOINTS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_CHECKPOINTS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_CHECKPOINTS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// Where the state of this unit before step t lies in (B, checkpoint_count(T), D) checkpoints.
template <std::int64_t kParts>
std::int64_t CheckpointOffset(const Unit& u, const Shape& shape, std::int64_t t) {
  const std::int64_t row = u.batch * checkpoint_count(shape.time) + t / kCheckpointBlock;
  return (row * shape.channels + u.channel) * kParts;
}

/// Sweep, saving the state before every block unless `checkpoints` is null. steps.begin is the
/// start of a block.
template <std::int64_t kParts, class Step, class T>
void SweepWithCheckpoints(const Step& step, const Unit& u, Steps steps, const Shape& shape,
                          T* state, T* checkpoints) {
  if (checkpoints == nullptr) return Sweep(step, steps, u.channels, state);
  for (std::int64_t t = steps.begin; t < steps.end; t += kCheckpointBlock) {
    std::memcpy(checkpoints + CheckpointOffset<kParts>(u, shape, t), state,
                static_cast<std::size_t>(u.channels * kParts) * sizeof(T));
    Sweep(step, {t, HWY_MIN(t + kCheckpointBlock, steps.end)}, u.channels, state);
  }
}

/// Calls f(block, state) from the last block to the first, `state` being a copy of the checkpoint.
template <std::int64_t kParts, class T, class F>
void ForEachCheckpointBack(const Unit& u, Steps steps, const Shape& shape, const T* checkpoints,
                           const F& f) {
  alignas(kCacheLine) T state[kTileCarryBytes / sizeof(T)];
  const std::int64_t count = checkpoint_count(steps.end - steps.begin);
  for (std::int64_t i = count - 1; i >= 0; --i) {
    const std::int64_t begin = steps.begin + i * kCheckpointBlock;
    std::memcpy(state, checkpoints + CheckpointOffset<kParts>(u, shape, begin),
                static_cast<std::size_t>(u.channels * kParts) * sizeof(T));
    f(Steps{begin, HWY_MIN(begin + kCheckpointBlock, steps.end)}, state);
  }
}

/// Rows of the stash begin on cache lines.
inline std::int64_t StashWidth(const Unit& u) {
  return (u.channels + kCacheLine - 1) / kCacheLine * kCacheLine;
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_CHECKPOINTS_INL_H_
