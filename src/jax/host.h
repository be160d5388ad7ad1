#pragma once

/// What the kernels need of their host: XLA's threads, and memory.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "gateloop/recurrence.h"
#include "recurrence/scratch.h"

namespace gateloop::jax {

/// One call of parallel_for. A helper that starts late finds nothing left and may outlive the call:
/// it shares this object, and touches `body` only for an index it took.
class Work {
 public:
  Work(std::int64_t n, const std::function<void(std::int64_t)>& body) : body_(body), size_(n) {}

  void help() {
    for (std::int64_t i = 0; (i = next_.fetch_add(1, std::memory_order_relaxed)) < size_;) {
      body_(i);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) done_.notify_all();
    }
  }
  void wait() const {
    for (std::int64_t seen = 0; (seen = done_.load(std::memory_order_acquire)) < size_;) {
      done_.wait(seen, std::memory_order_acquire);
    }
  }

 private:
  const std::function<void(std::int64_t)>& body_;
  const std::int64_t size_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<std::int64_t> done_{0};
};

/// The threads of a pool with num_threads() and Schedule(task): xla::ffi::ThreadPool, or the
/// tests'. The caller takes part in the work, so a pool whose threads are all busy cannot deadlock.
template <class Pool>
recurrence::Executor executor_of(Pool& pool) {
  recurrence::Executor executor;
  // Zero where XLA has no pool: then all is done on the calling thread.
  executor.threads = static_cast<int>(std::max<std::int64_t>(1, pool.num_threads()));
  executor.parallel_for = [&pool](std::int64_t n, const std::function<void(std::int64_t)>& body) {
    const auto work = std::make_shared<Work>(n, body);
    for (std::int64_t helper = 1; helper < n; ++helper) {
      pool.Schedule([work] { work->help(); });
    }
    work->help();
    work->wait();
  };
  return executor;
}

/// The kernel on XLA's threads. Scratch comes from the heap: XLA's allocator for handlers is one of
/// device memory, and its CPU client answers "No device memory allocator available". It is at most
/// some 256 KiB a thread, so that malloc hands the same memory out again.
template <class Params>
void run(const Params& params, const recurrence::Executor& executor) {
  recurrence::Scratch scratch;
  const std::size_t bytes = recurrence::scratch_bytes(params, executor.threads);
  recurrence::run(params, executor, scratch.bytes(bytes));
}

}  // namespace gateloop::jax
