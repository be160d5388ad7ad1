#pragma once

/// Items of uneven cost over the threads that the host lends.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "gateloop/recurrence.h"

namespace gateloop::recurrence::cpu {

/// Calls body(item, slot) for every item; a slot is one thread's at a time.
template <class Body>
void parallel(const Executor& executor, int slots, std::int64_t items, const Body& body) {
  const std::int64_t used = executor.parallel_for ? std::min<std::int64_t>(slots, items) : 1;
  if (used <= 1) {
    for (std::int64_t i = 0; i < items; ++i) body(i, 0);
    return;
  }
  // Sixteen turns a slot even out uneven threads and make the counter free.
  const std::int64_t turn = std::max<std::int64_t>(1, items / (used * 16));
  std::atomic<std::int64_t> next{0};
  executor.parallel_for(used, [&](std::int64_t slot) {
    for (std::int64_t i; (i = next.fetch_add(turn, std::memory_order_relaxed)) < items;) {
      for (const std::int64_t end = std::min(items, i + turn); i < end; ++i) body(i, slot);
    }
  });
}

}  // namespace gateloop::recurrence::cpu
