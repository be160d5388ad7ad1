#pragma once

/// Sequences of different lengths along the time of one batch entry: each is a problem of its own.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/cpu/schedule.h"

namespace gateloop::recurrence::cpu {

// ---------------------------------------------------------------- what an operation reads

inline auto sequences_of(LinearRecurrence& p) { return std::tie(p.a, p.x, p.h); }
inline auto sequences_of(LinearRecurrenceBackward& p) {
  return std::tie(p.a, p.h, p.dh, p.da, p.dx);
}
inline auto sequences_of(PolarGateLoop& p) { return std::tie(p.q, p.k, p.v, p.z, p.y); }
inline auto sequences_of(PolarGateLoopBackward& p) {
  return std::tie(p.q, p.k, p.v, p.z, p.dy, p.dq, p.dk, p.dv, p.dz);
}
inline auto sequences_of(SimpleGateLoop& p) { return std::tie(p.q, p.kv, p.z, p.y); }
inline auto sequences_of(SimpleGateLoopBackward& p) {
  return std::tie(p.q, p.kv, p.z, p.dy, p.dq, p.dkv, p.dz);
}

template <class Params>
auto states_of(Params& p) {
  if constexpr (requires { p.final_state; }) {
    return std::tie(p.initial_state, p.final_state);
  } else if constexpr (requires { p.initial_state; }) {
    return std::tie(p.initial_state, p.dfinal_state, p.dinitial_state);
  } else {
    return std::tie(p.dfinal_state, p.dinitial_state);
  }
}

// ---------------------------------------------------------------- one sequence

inline void advance(const void*& data, std::int64_t bytes) {
  if (data != nullptr) data = static_cast<const std::byte*>(data) + bytes;
}
inline void advance(void*& data, std::int64_t bytes) {
  if (data != nullptr) data = static_cast<std::byte*>(data) + bytes;
}

/// `p` on its sequence n alone.
template <class Params>
Params sequence_of(const Params& p, const Problem& whole, std::int64_t n) {
  const auto begin = p.offsets[static_cast<std::size_t>(n)];
  // Strides count elements of the storage type: complex ones where the sequences are complex.
  const auto element =
      static_cast<std::int64_t>(storage_bytes(p.dtype)) * (is_complex(p.dtype) ? 2 : 1);
  const auto state = p.shape.channels * static_cast<std::int64_t>(whole.carry_bytes);
  Params one = p;
  one.offsets = {};
  one.shape.time = p.offsets[static_cast<std::size_t>(n) + 1] - begin;
  std::apply(
      [&](auto&... sequence) {
        (advance(sequence.data, begin * sequence.time_stride * element), ...);
      },
      sequences_of(one));
  std::apply([&](auto&... states) { (advance(states, n * state), ...); }, states_of(one));
  if constexpr (requires { one.saved_states; }) {
    advance(one.saved_states, saved_state_count(begin, n) * state);
  }
  return one;
}

// ---------------------------------------------------------------- all of them

/// Whether each sequence runs on one thread, `slots` of them at a time. Else each runs on all
/// threads, one after the other. And the scratch that a sequence takes.
struct RaggedPlan {
  bool side_by_side;
  int slots;
  std::size_t scratch;
};

inline RaggedPlan ragged_plan(const Problem& whole, Offsets offsets, int threads) {
  const auto length = [&](std::size_t n) { return offsets[n + 1] - offsets[n]; };
  const int slots = slots_for(whole.shape.time * whole.shape.channels, threads);
  std::int64_t filled = 0, longest = 0;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    filled += length(n) > 0;
    longest = std::max(longest, length(n));
  }
  // Side by side no thread waits for another, but one with a long sequence may be the last: of at
  // most twice its share it takes at most three times as long as all threads together.
  const bool side_by_side = filled >= slots && longest * slots <= 2 * whole.shape.time;
  RaggedPlan plan{side_by_side || slots == 1, slots, 0};
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    Problem one = whole;
    one.shape.time = length(n);
    plan.scratch = std::max(plan.scratch, scratch_bytes(one, plan.side_by_side ? 1 : threads));
  }
  plan.scratch = (plan.scratch + kCacheLine - 1) / kCacheLine * kCacheLine;
  return plan;
}

template <class Params>
std::size_t scratch_bytes(const Params& p, const Problem& whole, int threads) {
  if (p.offsets.empty()) return scratch_bytes(whole, threads);
  const RaggedPlan plan = ragged_plan(whole, p.offsets, threads);
  return plan.scratch * static_cast<std::size_t>(plan.side_by_side ? plan.slots : 1);
}

/// Calls run(params, problem, executor, scratch) for every sequence of p.
template <class Params, class Run>
void run_each(const Params& p, std::type_identity_t<Problem (*)(const Params&)> problem_of,
              const Executor& executor, void* scratch, const Run& run) {
  const Problem whole = problem_of(p);
  if (p.offsets.empty()) return run(p, whole, executor, scratch);
  const RaggedPlan plan = ragged_plan(whole, p.offsets, executor.threads);
  const std::int64_t count = std::ssize(p.offsets) - 1;
  const auto run_one = [&](std::int64_t n, const Executor& threads, std::int64_t slot) {
    const Params one = sequence_of(p, whole, n);
    run(one, problem_of(one), threads,
        static_cast<std::byte*>(scratch) + static_cast<std::size_t>(slot) * plan.scratch);
  };
  if (plan.side_by_side) {
    parallel(executor, plan.slots, count,
             [&](std::int64_t n, std::int64_t slot) { run_one(n, Executor{}, slot); });
  } else {
    for (std::int64_t n = 0; n < count; ++n) run_one(n, executor, 0);
  }
}

}  // namespace gateloop::recurrence::cpu
