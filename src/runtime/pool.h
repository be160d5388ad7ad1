#pragma once

/// Threads of a session, on which the kernels run.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "gateloop/recurrence.h"

namespace gateloop::runtime {

/// threads - 1 workers beside the caller. They poll for work for some 50 us, then sleep.
class Pool {
 public:
  /// Throws std::system_error where the system has no thread left.
  explicit Pool(int threads);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  /// Runs on these threads; the pool must outlive it. One caller at a time.
  recurrence::Executor executor();

 private:
  using Body = std::function<void(std::int64_t)>;

  void parallel_for(std::int64_t n, const Body& body);
  void work();
  void take_items(const Body& body, std::int64_t n);
  void stop();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> round_{0};  // counts calls; odd while one may be joined
  std::atomic<int> inside_{0};           // workers that may hold `body_`
  std::atomic<std::int64_t> next_{0}, done_{0};
  const Body* body_ = nullptr;
  std::int64_t items_ = 0;
  std::atomic<bool> stopping_{false};
};

}  // namespace gateloop::runtime
