#pragma once

/// Work whose parts wait for one another: phases of units, all of a phase before any of the next.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <thread>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/parallel.h"

namespace gateloop::recurrence::cpu {

/// How far the units have come, in memory of the caller.
class Phases {
 public:
  static std::size_t bytes(std::int64_t units) {
    return static_cast<std::size_t>(units + 1) * sizeof(Counter);
  }
  Phases(void* memory, std::int64_t units)
      : done_(new (memory) Counter), taken_(static_cast<Counter*>(memory) + 1), units_(units) {
    for (std::int64_t u = 0; u < units; ++u) new (taken_ + u) Counter;
  }

  /// Calls body(phase, unit) for every unit of every phase. A thread stays with its unit, because
  /// its caches hold what that read before. One that waits too long takes work that no thread has
  /// begun. So fewer threads than units, down to one, finish.
  template <class Body>
  void run(const Executor& executor, std::int64_t phases, const Body& body) {
    fan_out(executor, units_, [&](std::int64_t own) {
      for (std::int64_t phase = 0; phase < phases; ++phase) {
        attempt(phase, own, body);
        for (std::int64_t waits = 0; !is_done(phase); ++waits) {
          if (waits < kPhaseSpins) continue;
          for (std::int64_t unit = 0; unit < units_; ++unit) attempt(phase, unit, body);
          std::this_thread::yield();
        }
      }
    });
  }

 private:
  struct alignas(kCacheLine) Counter {
    std::atomic<std::int64_t> count{0};
  };

  bool is_done(std::int64_t phase) const {
    return done_->count.load(std::memory_order_acquire) >= (phase + 1) * units_;
  }
  template <class Body>
  void attempt(std::int64_t phase, std::int64_t unit, const Body& body) {
    std::int64_t before = phase;
    if (!taken_[unit].count.compare_exchange_strong(before, phase + 1)) return;
    body(phase, unit);
    done_->count.fetch_add(1, std::memory_order_acq_rel);
  }

  Counter* done_;   // units of all phases
  Counter* taken_;  // phases of each unit
  std::int64_t units_;
};

}  // namespace gateloop::recurrence::cpu
