#include "runtime/pool.h"

#include <algorithm>

namespace gateloop::runtime {
namespace {

/// Polls for work before a worker sleeps: some 50 us, more than lies between the calls of one step.
constexpr int kSpins = 20'000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

/// Waits for other threads, and offers its core where they may be waiting for one.
template <class Condition>
void wait_until(const Condition& condition) {
  for (int i = 0; !condition(); ++i) {
    if (i < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

recurrence::Executor Pool::executor() {
  if (workers_.empty()) return {};
  return {threads(), [this](std::int64_t n, const Body& body) { parallel_for(n, body); }};
}

void Pool::take_items(const Body& body, std::int64_t n) {
  for (std::int64_t i; (i = next_.fetch_add(1)) < n;) {
    body(i);
    done_.fetch_add(1);
  }
}

/// A round is odd while workers may join it. A worker counts itself inside before it reads the
/// round. The caller ends the round before it waits for those inside. So no worker reads the body
/// of a call that has returned.
void Pool::parallel_for(std::int64_t n, const Body& body) {
  body_ = &body;
  items_ = n;
  next_ = 0;
  done_ = 0;
  {
    const std::lock_guard lock(mutex_);
    round_.fetch_add(1);
  }
  wake_.notify_all();
  take_items(body, n);
  wait_until([&] { return done_.load() >= n; });
  round_.fetch_add(1);
  wait_until([&] { return inside_.load() == 0; });
}

void Pool::work() {
  std::uint64_t seen = 0;
  const auto is_open = [&] {
    const std::uint64_t round = round_.load();
    return round % 2 == 1 && round != seen;
  };
  while (!stopping_) {
    for (int i = 0; i < kSpins && !is_open() && !stopping_; ++i) pause();
    if (!is_open()) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || is_open(); });
      if (stopping_) return;
    }
    inside_.fetch_add(1);
    const std::uint64_t round = round_.load();
    if (round % 2 == 1) {
      take_items(*body_, items_);
      seen = round;
    }
    inside_.fetch_sub(1);
  }
}

}  // namespace gateloop::runtime
