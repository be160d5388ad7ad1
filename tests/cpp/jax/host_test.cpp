#include "jax/host.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gateloop::jax {
namespace {

/// Threads with a queue, as XLA's pool. The destructor runs what is left.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  std::int64_t num_threads() const { return static_cast<std::int64_t>(threads_.size()); }
  void Schedule(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  void serve() {
    for (;;) {
      std::unique_lock lock(mutex_);
      ready_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

/// Calls body(i) for each i below n, which writes memory that is no atomic, and checks it after.
void expect_every_index_once(const recurrence::Executor& executor, std::int64_t n) {
  std::vector<int> calls(static_cast<std::size_t>(n));
  executor.parallel_for(n, [&](std::int64_t i) { ++calls[static_cast<std::size_t>(i)]; });
  for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(calls[static_cast<std::size_t>(i)], 1) << i;
}

TEST(ExecutorOf, EveryIndexIsDoneOnceAndSeenByTheCaller) {
  Pool pool(4);
  const recurrence::Executor executor = executor_of(pool);
  EXPECT_EQ(executor.threads, 4);
  for (int round = 0; round < 500; ++round) {
    for (const std::int64_t n : {0, 1, 2, 4, 33}) expect_every_index_once(executor, n);
  }
}

TEST(ExecutorOf, APoolWithoutThreadsLeavesAllToTheCaller) {
  Pool pool(0);
  const recurrence::Executor executor = executor_of(pool);
  EXPECT_EQ(executor.threads, 1);
  expect_every_index_once(executor, 1);
}

TEST(ExecutorOf, CallersShareOnePool) {
  Pool pool(2);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&pool] {
      const recurrence::Executor executor = executor_of(pool);
      for (int round = 0; round < 200; ++round) expect_every_index_once(executor, 5);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

/// Helpers that never start: the caller does all of the work itself, and they outlive its call.
TEST(ExecutorOf, ABusyPoolDelaysNothing) {
  std::mutex gate;
  gate.lock();
  Pool pool(2);
  for (int i = 0; i < 2; ++i) pool.Schedule([&gate] { const std::lock_guard wait(gate); });
  for (int round = 0; round < 20; ++round) expect_every_index_once(executor_of(pool), 6);
  gate.unlock();
}

TEST(ExecutorOf, CallsMayBeNested) {
  Pool pool(3);
  const recurrence::Executor executor = executor_of(pool);
  for (int round = 0; round < 50; ++round) {
    executor.parallel_for(3, [&](std::int64_t) { expect_every_index_once(executor, 4); });
  }
}

}  // namespace
}  // namespace gateloop::jax
