// The operators run on torch's threads, as many as torch is set to.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "ops/kernels/executor.h"

namespace threads_test {

/// Whether two bodies run at once: on one thread the second begins after the first has given up.
bool meet(const gateloop::recurrence::Executor& executor, std::chrono::milliseconds timeout) {
  std::atomic<int> present{0};
  std::atomic<bool> met{false};
  executor.parallel_for(2, [&](std::int64_t) {
    if (present.fetch_add(1) == 1) met = true;
    const auto end = std::chrono::steady_clock::now() + timeout;
    while (!met && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    present.fetch_sub(1);
  });
  return met;
}

TEST(Threads, AreTorchs) {
  const int before = at::get_num_threads();
  at::set_num_threads(2);
  const auto two = gateloop::ops::torch_threads();
  EXPECT_EQ(two.threads, 2);
  EXPECT_TRUE(meet(two, std::chrono::seconds(10)));
  at::set_num_threads(1);
  const auto one = gateloop::ops::torch_threads();
  EXPECT_EQ(one.threads, 1);
  EXPECT_FALSE(meet(one, std::chrono::milliseconds(50)));
  at::set_num_threads(before);
}

}  // namespace threads_test
