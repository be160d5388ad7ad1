#include "host/memory_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace gateloop::host {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

TEST(MemoryPool, KeepsWhatMallocDoesNot) {
  EXPECT_FALSE(MemoryPool::keeps(0));
  EXPECT_FALSE(MemoryPool::keeps(32 * kMiB));
  EXPECT_TRUE(MemoryPool::keeps(32 * kMiB + 1));
}

TEST(MemoryPool, GivesABlockAgain) {
  MemoryPool pool;
  void* const block = pool.take(40 * kMiB + 1);
  ASSERT_NE(block, nullptr);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block) % 64, 0U);
  std::memset(block, 1, 40 * kMiB + 1);
  EXPECT_EQ(pool.unused_bytes(), 0U);
  pool.give_back(block);
  EXPECT_EQ(pool.unused_bytes(), 42 * kMiB);
  EXPECT_EQ(pool.take(36 * kMiB), block);  // nine tenths of it
  EXPECT_EQ(pool.unused_bytes(), 0U);
  pool.give_back(block);
  EXPECT_EQ(pool.release_unused(), 42 * kMiB);
}

TEST(MemoryPool, GivesTwoUsersTwoBlocks) {
  MemoryPool pool;
  auto* const a = static_cast<char*>(pool.take(34 * kMiB));
  auto* const b = static_cast<char*>(pool.take(34 * kMiB));
  ASSERT_TRUE(a != nullptr && b != nullptr);
  EXPECT_TRUE(a + 34 * kMiB <= b || b + 34 * kMiB <= a);
  pool.give_back(a);
  pool.give_back(b);
  EXPECT_EQ(pool.release_unused(), 68 * kMiB);
}

TEST(MemoryPool, MakesRoomForAnotherSize) {
  MemoryPool pool;
  pool.give_back(pool.take(100 * kMiB));
  void* const small = pool.take(34 * kMiB);  // a third of the block: too little of it
  EXPECT_EQ(pool.unused_bytes(), 0U);
  pool.give_back(small);
  void* const large = pool.take(200 * kMiB);
  EXPECT_EQ(pool.unused_bytes(), 0U);
  pool.give_back(large);
  pool.release_unused();
}

TEST(MemoryPool, KeepsNoMoreThanAGibibyte) {
  MemoryPool pool;
  std::vector<void*> blocks;
  for (int i = 0; i < 12; ++i) blocks.push_back(pool.take(100 * kMiB));  // no page of it touched
  for (void* block : blocks) pool.give_back(block);
  EXPECT_EQ(pool.unused_bytes(), 1000 * kMiB);
  void* const huge = pool.take(1100 * kMiB);
  pool.give_back(huge);
  EXPECT_LE(pool.unused_bytes(), 1024 * kMiB);
  pool.release_unused();
  EXPECT_EQ(pool.unused_bytes(), 0U);
}

TEST(MemoryPool, LeavesStrangersAlone) {
  MemoryPool pool;
  int stranger = 0;
  pool.give_back(&stranger);
  pool.give_back(nullptr);
  EXPECT_EQ(pool.unused_bytes(), 0U);
}

TEST(MemoryPool, SaysWhenThereIsNoMemory) {
  MemoryPool pool;
  EXPECT_EQ(pool.take(std::size_t{1} << 60), nullptr);
}

TEST(MemoryPool, ServesThreads) {
  MemoryPool pool;
  std::vector<std::thread> threads;
  for (char mark = 0; mark < 4; ++mark) {
    threads.emplace_back([&pool, mark] {
      for (int i = 0; i < 50; ++i) {
        auto* const block = static_cast<char*>(pool.take(33 * kMiB));
        block[0] = block[33 * kMiB - 1] = mark;
        std::this_thread::yield();
        EXPECT_EQ(block[0], mark);
        EXPECT_EQ(block[33 * kMiB - 1], mark);
        pool.give_back(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(pool.unused_bytes(), 4 * 34 * kMiB);
  pool.release_unused();
}

TEST(MemoryPool, AChildForkedMeanwhileCanUseIt) {
  MemoryPool& pool = MemoryPool::shared();
  std::atomic<bool> done{false};
  std::thread other([&] {
    while (!done) pool.give_back(pool.take(40 * kMiB));
  });
  for (int i = 0; i < 100; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(20);  // ends a child that waits for a lock
      pool.give_back(pool.take(50 * kMiB));
      ::_exit(0);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "child " << i;
  }
  done = true;
  other.join();
  pool.release_unused();
}

}  // namespace
}  // namespace gateloop::host
