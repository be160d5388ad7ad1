// GateLoop for heads wider than one channel, and its adjoint: step by step, or in chunks of
// time as matrix products.
#include <string>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/gate_loop_plan.h"
#include "recurrence/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/gate_loop.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/gate_loop_backward-inl.h"
#include "recurrence/cpu/gate_loop_forward-inl.h"
#include "recurrence/cpu/gate_loop_steps-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class Op>
void RunChunks(const Op& op, const TileSizes& n, const ChunkPlan& plan, const Executor& executor,
               void* scratch) {
  TileMemory memory(scratch);
  const ChunkStates<typename Op::T> states(n, plan, memory);
  void* const rest = static_cast<std::byte*>(scratch) + memory.taken();
  const auto tiles = [&](std::int64_t slot) { return tiles_of<typename Op::Tiles>(slot, n, rest); };
  if (!plan.cut) {
    return parallel(executor, plan.slots, plan.units,
                    [&](std::int64_t unit, std::int64_t slot) { op.Whole(unit, tiles(slot)); });
  }
  const auto for_each_chunk = [&](const auto& work) {
    parallel(executor, plan.slots, plan.units * plan.chunks,
             [&](std::int64_t i, std::int64_t slot) {
               const std::int64_t unit = i / plan.chunks, chunk = i % plan.chunks;
               if (chunk < op.ChunksOf(unit)) work(unit, chunk, tiles(slot));
             });
  };
  for_each_chunk([&](std::int64_t unit, std::int64_t chunk, const auto& t) {
    op.Sum(unit, chunk, t, states);
  });
  for (std::int64_t unit = 0; unit < plan.units; ++unit) op.Begin(unit, states);
  parallel(executor, plan.slots, plan.units * n.keys,
           [&](std::int64_t i, std::int64_t) { op.Advance(i / n.keys, i % n.keys, states); });
  for (std::int64_t unit = 0; unit < plan.units; ++unit) op.End(unit, states);
  for_each_chunk([&](std::int64_t unit, std::int64_t chunk, const auto& t) {
    op.Finish(unit, chunk, t, states);
  });
}

template <template <class, int, bool> class Op, template <class> class StepsOp, class Params>
void RunHeads(const Params& p, const Executor& executor, void* scratch) {
  const TileSizes n(p);
  const ChunkPlan plan(p, executor.threads);
  const auto run = [&]<class T, int kParts, bool kPerKey>() {
    if (is_stepwise(p)) {
      RunSteps<StepsOp, T, kParts, kPerKey>(p, n, plan.slots, executor, scratch);
    } else {
      RunChunks(Op<T, kParts, kPerKey>(p), n, plan, executor, scratch);
    }
  };
  const auto run_parts = [&]<class T, int kParts>() {
    p.per_key ? run.template operator()<T, kParts, true>()
              : run.template operator()<T, kParts, false>();
  };
  const auto run_in = [&]<class T>() {
    p.complex ? run_parts.template operator()<T, 2>() : run_parts.template operator()<T, 1>();
  };
  p.dtype == DType::kFloat64 ? run_in.template operator()<double>()
                             : run_in.template operator()<float>();
}

void RunGateLoop(const GateLoop& p, const Executor& executor, void* scratch) {
  RunHeads<GateLoopForward, StepsForward>(p, executor, scratch);
}
void RunGateLoopBackward(const GateLoopBackward& p, const Executor& executor, void* scratch) {
  RunHeads<GateLoopAdjoint, StepsBackward>(p, executor, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunGateLoop);
HWY_EXPORT(RunGateLoopBackward);
namespace {

template <template <class> class Tiles, class T, class Params>
std::size_t scratch_bytes_of(const Params& p, int threads) {
  const TileSizes n(p);
  const ChunkPlan plan(p, threads);
  const auto slots = static_cast<std::size_t>(plan.slots);
  if (is_stepwise(p)) return slots * tile_bytes<StepTiles<T>>(n);
  TileMemory shared(nullptr);
  const ChunkStates<T> states(n, plan, shared);
  return shared.taken() + slots * tile_bytes<Tiles<T>>(n);
}

template <template <class> class Tiles, class Params>
std::size_t scratch_bytes_of(const Params& p, int threads) {
  return p.dtype == DType::kFloat64 ? scratch_bytes_of<Tiles, double>(p, threads)
                                    : scratch_bytes_of<Tiles, float>(p, threads);
}

template <class Params>
void check_heads(const char* op, const Params& p) {
  check(op, {p.shape.batch, p.shape.time, p.shape.heads}, p.dtype, /*complex_allowed=*/false);
  check(op, Shape{p.shape.batch, p.shape.time, p.shape.heads}, p.offsets);
  if (p.shape.keys < 0 || p.shape.values < 0) {
    throw std::invalid_argument(
        std::string(op) + ": keys and values must be non-negative, got keys " +
        std::to_string(p.shape.keys) + " and values " + std::to_string(p.shape.values));
  }
  if (p.per_key && p.feature_map != FeatureMap::kNone)
    throw std::invalid_argument(std::string(op) + ": per_key must be false with a feature map");
}

}  // namespace
}  // namespace cpu

std::size_t scratch_bytes(const GateLoop& p, int threads) {
  return cpu::scratch_bytes_of<cpu::ForwardTiles>(p, threads);
}
std::size_t scratch_bytes(const GateLoopBackward& p, int threads) {
  return cpu::scratch_bytes_of<cpu::BackwardTiles>(p, threads);
}
void run(const GateLoop& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check_heads("GateLoop", p);
  HWY_DYNAMIC_DISPATCH(RunGateLoop)(p, executor, scratch);
}
void run(const GateLoopBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check_heads("GateLoopBackward", p);
  HWY_DYNAMIC_DISPATCH(RunGateLoopBackward)(p, executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
