#include "jax/host.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace gateloop::jax {
namespace {

/// One call of parallel_for. A helper that XLA starts late finds nothing left and may outlive the
/// call: it shares this, and touches `body` only for an index it took.
struct Work {
  const std::function<void(std::int64_t)>& body;
  const std::int64_t size;
  std::atomic<std::int64_t> next{0};
  std::atomic<std::int64_t> done{0};

  Work(std::int64_t n, const std::function<void(std::int64_t)>& f) : body(f), size(n) {}

  void help() {
    for (std::int64_t i = 0; (i = next.fetch_add(1, std::memory_order_relaxed)) < size;) {
      body(i);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == size) done.notify_all();
    }
  }
  void wait() const {
    for (std::int64_t seen = 0; (seen = done.load(std::memory_order_acquire)) < size;) {
      done.wait(seen, std::memory_order_acquire);
    }
  }
};

}  // namespace

recurrence::Executor lend_threads(xla::ffi::ThreadPool& pool) {
  recurrence::Executor executor;
  // Zero where XLA lends none: then all is done on the calling thread.
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

}  // namespace gateloop::jax
