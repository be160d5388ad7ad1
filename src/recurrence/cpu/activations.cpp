// Elementwise activations and their adjoints, one pass each.
#include <algorithm>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/training.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/activations.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// Calls body(d, i) for vectors of all elements, in stretches of a few pages on `slots` threads.
template <class T, class Body>
void ForEachElement(std::int64_t elements, int slots, const Executor& executor, const Body& body) {
  constexpr std::int64_t kStretch = 4096;
  parallel(executor, slots, (elements + kStretch - 1) / kStretch,
           [&](std::int64_t item, std::int64_t) {
             const std::int64_t first = item * kStretch;
             ForEachVector<T>(std::min(kStretch, elements - first),
                              [&](auto d, std::int64_t c) HWY_ATTR { body(d, first + c); });
           });
}

void RunGelu(const Gelu& p, int slots, const Executor& executor) {
  WithStorageOf(p.dtype, [&]<class S>() {
    const S* const x = static_cast<const S*>(p.x);
    S* const y = static_cast<S*>(p.y);
    ForEachElement<Accumulation<S>>(
        p.elements, slots, executor, [&](auto d, std::int64_t i) HWY_ATTR {
          StoreReal(d, GeluValue(d, LoadReal(d, x + i)), y + i, /*stream=*/false);
        });
  });
}

void RunGeluBackward(const GeluBackward& p, int slots, const Executor& executor) {
  WithStorageOf(p.dtype, [&]<class S>() {
    const S *const x = static_cast<const S*>(p.x), *const dy = static_cast<const S*>(p.dy);
    S* const dx = static_cast<S*>(p.dx);
    ForEachElement<Accumulation<S>>(
        p.elements, slots, executor, [&](auto d, std::int64_t i) HWY_ATTR {
          const auto slope = GeluSlope(d, LoadReal(d, x + i));
          StoreReal(d, hn::Mul(slope, LoadReal(d, dy + i)), dx + i, /*stream=*/false);
        });
  });
}

void RunSwishGate(const SwishGate& p, int slots, const Executor& executor) {
  WithStorageOf(p.dtype, [&]<class S>() {
    const S *const g = static_cast<const S*>(p.g), *const x = static_cast<const S*>(p.x);
    S* const y = static_cast<S*>(p.y);
    ForEachElement<Accumulation<S>>(
        p.elements, slots, executor, [&](auto d, std::int64_t i) HWY_ATTR {
          const Real<decltype(d)> gate{LoadReal(d, g + i)};
          const auto swish = hn::Mul(gate.re, MakeSigmoidGate(d, gate).a.re);
          StoreReal(d, hn::Mul(swish, LoadReal(d, x + i)), y + i, /*stream=*/false);
        });
  });
}

/// With s = σ(g): dx = g s dy and dg = s (1 + g (1 - s)) x dy.
void RunSwishGateBackward(const SwishGateBackward& p, int slots, const Executor& executor) {
  WithStorageOf(p.dtype, [&]<class S>() {
    const S *const g = static_cast<const S*>(p.g), *const x = static_cast<const S*>(p.x),
                   *const dy = static_cast<const S*>(p.dy);
    S *const dg = static_cast<S*>(p.dg), *const dx = static_cast<S*>(p.dx);
    ForEachElement<Accumulation<S>>(
        p.elements, slots, executor, [&](auto d, std::int64_t i) HWY_ATTR {
          const Real<decltype(d)> gate{LoadReal(d, g + i)};
          const auto s = MakeSigmoidGate(d, gate).a.re;
          const auto gradient = LoadReal(d, dy + i), swish = hn::Mul(gate.re, s);
          StoreReal(d, hn::Mul(swish, gradient), dx + i, /*stream=*/false);
          // s + g s (1 - s)
          const auto slope = hn::MulAdd(swish, hn::Sub(hn::Set(d, 1), s), s);
          const auto along = hn::Mul(LoadReal(d, x + i), gradient);
          StoreReal(d, hn::Mul(slope, along), dg + i, /*stream=*/false);
        });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunGelu);
HWY_EXPORT(RunGeluBackward);
HWY_EXPORT(RunSwishGate);
HWY_EXPORT(RunSwishGateBackward);

template <class Params>
int checked_slots(const char* op, const Params& p, const Executor& executor) {
  check(op, {1, 1, p.elements}, p.dtype, /*complex_allowed=*/false);
  return slots_for(p.elements, executor.threads);
}
}  // namespace cpu

std::size_t scratch_bytes(const Gelu&, int) { return 0; }
std::size_t scratch_bytes(const GeluBackward&, int) { return 0; }
std::size_t scratch_bytes(const SwishGate&, int) { return 0; }
std::size_t scratch_bytes(const SwishGateBackward&, int) { return 0; }

void run(const Gelu& p, const Executor& executor, void*) {
  const int slots = cpu::checked_slots("Gelu", p, executor);
  using namespace cpu;
  HWY_DYNAMIC_DISPATCH(RunGelu)(p, slots, executor);
}
void run(const GeluBackward& p, const Executor& executor, void*) {
  const int slots = cpu::checked_slots("GeluBackward", p, executor);
  using namespace cpu;
  HWY_DYNAMIC_DISPATCH(RunGeluBackward)(p, slots, executor);
}
void run(const SwishGate& p, const Executor& executor, void*) {
  const int slots = cpu::checked_slots("SwishGate", p, executor);
  using namespace cpu;
  HWY_DYNAMIC_DISPATCH(RunSwishGate)(p, slots, executor);
}
void run(const SwishGateBackward& p, const Executor& executor, void*) {
  const int slots = cpu::checked_slots("SwishGateBackward", p, executor);
  using namespace cpu;
  HWY_DYNAMIC_DISPATCH(RunSwishGateBackward)(p, slots, executor);
}

}  // namespace gateloop::recurrence
#endif
