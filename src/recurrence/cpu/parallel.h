#pragma once

/// Items of uneven cost over the threads of an Executor.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/subnormals.h"

namespace gateloop::recurrence::cpu {

/// Calls work(i) for every i in [0, n), each on another thread where the executor has several.
/// Subnormal numbers are flushed to zero there. All arithmetic of the kernels runs in here.
template <class Work>
void fan_out(const Executor& executor, std::int64_t n, const Work& work) {
  const auto flushed = [&work](std::int64_t i) {
    const FlushSubnormals mode;
    work(i);
  };
  if (executor.parallel_for && n > 1) return executor.parallel_for(n, flushed);
  for (std::int64_t i = 0; i < n; ++i) flushed(i);
}

/// Threads for a call on so many elements.
inline int slots_for(std::int64_t elements, int threads) {
  return elements < kInlineElements ? 1 : std::max(1, threads);
}

/// Calls body(item, slot) for every item; a slot is one thread's at a time.
template <class Body>
void parallel(const Executor& executor, int slots, std::int64_t items, const Body& body) {
  const std::int64_t used = std::min<std::int64_t>(slots, items);
  // Sixteen turns a slot even out uneven threads and make the counter free.
  const std::int64_t turn = used == 0 ? 1 : std::max<std::int64_t>(1, items / (used * 16));
  std::atomic<std::int64_t> next{0};
  fan_out(executor, used, [&](std::int64_t slot) {
    for (std::int64_t i; (i = next.fetch_add(turn, std::memory_order_relaxed)) < items;) {
      for (const std::int64_t end = std::min(items, i + turn); i < end; ++i) body(i, slot);
    }
  });
}

}  // namespace gateloop::recurrence::cpu
