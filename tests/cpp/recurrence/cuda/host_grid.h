#pragma once

/// Runs the body of a CUDA kernel on the CPU: all blocks and threads, phase by phase, in an order
/// that the test chooses. Keeps an account of the accesses to global memory.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "recurrence/cuda/plan-inl.h"
#include "recurrence/cuda/scan-inl.h"

namespace gateloop::testing::cuda {

using namespace recurrence::cuda;

/// In what order blocks and threads run.
struct Order {
  /// Blocks at work at a time; each phase is run by one of them, drawn at random.
  int resident = 1;
  /// Of a hundred draws, those that take the block that began last.
  int newest = 0;
  bool shuffle_threads = false;
  std::uint64_t seed = 1;
};

/// What a launch did to global memory.
struct Traffic {
  std::int64_t read = 0, written = 0;  // bytes of arrays and states
  std::int64_t carried = 0;            // bytes of carries, flags, tickets and offsets, both ways
  /// Sectors of 32 bytes: those that the accesses of warps touch, and the fewest that hold as many
  /// bytes.
  std::int64_t sectors = 0, least_sectors = 0;
};

struct Access {
  std::uintptr_t at;
  std::uint32_t bytes;
};

/// Global memory as one block reads it.
class HostMemory {
 public:
  /// A store to a carry, not yet visible to others.
  struct Pending {
    std::byte* at;
    std::size_t bytes;
    std::byte value[16];
    std::int64_t phase;
  };
  struct Block {
    std::vector<Pending> pending;
    std::int64_t phase = 0;
    std::vector<Access>* log = nullptr;  // of the thread that runs
  };
  struct Scratch {
    const std::byte *begin = nullptr, *end = nullptr;
    bool holds(const void* p) const { return p >= begin && p < end; }
  };

  HostMemory(Block& block, Scratch scratch, Traffic* traffic)
      : block_(&block), scratch_(scratch), traffic_(traffic) {}

  template <class X>
  X load(const X* from) {
    note(from, sizeof(X), &Traffic::read);
    X value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  template <class X>
  void store(X* to, const X& value) {
    note(to, sizeof(X), &Traffic::written);
    if (!scratch_.holds(to)) {
      std::memcpy(to, &value, sizeof value);
      return;
    }
    Pending pending{reinterpret_cast<std::byte*>(to), sizeof value, {}, block_->phase};
    std::memcpy(pending.value, &value, sizeof value);
    block_->pending.push_back(pending);
  }
  template <class X>
  X load_fresh(const X* from) {
    return load(from);
  }
  unsigned acquire(const unsigned* flag) {
    note(flag, sizeof(unsigned), &Traffic::read);
    return *flag;
  }
  /// Others read what the block stored in earlier phases: only a barrier orders the stores of its
  /// other threads before the flag.
  void release(unsigned* flag, unsigned value) {
    note(flag, sizeof(unsigned), &Traffic::written);
    std::erase_if(block_->pending, [this](const Pending& p) {
      if (p.phase == block_->phase) return false;
      std::memcpy(p.at, p.value, p.bytes);
      return true;
    });
    *flag = value;
  }
  std::int64_t next(unsigned* ticket) {
    note(ticket, sizeof(unsigned), &Traffic::read);
    return (*ticket)++;
  }

 private:
  void note(const void* at, std::size_t bytes, std::int64_t Traffic::*side) {
    if (traffic_ == nullptr) return;
    (scratch_.holds(at) ? traffic_->carried : traffic_->*side) += static_cast<std::int64_t>(bytes);
    block_->log->push_back(
        {reinterpret_cast<std::uintptr_t>(at), static_cast<std::uint32_t>(bytes)});
  }

  Block* block_;
  Scratch scratch_;
  Traffic* traffic_;
};

/// Adds the sectors that a warp's threads touched, the k-th access of all at a time.
inline void count_sectors(const std::vector<std::vector<Access>>& logs, Traffic& traffic) {
  std::size_t most = 0;
  for (const auto& log : logs) most = std::max(most, log.size());
  for (std::size_t k = 0; k < most; ++k) {
    std::set<std::uintptr_t> sectors;
    std::set<std::uintptr_t> addresses;  // threads that read one number make one access
    std::int64_t bytes = 0;
    for (const auto& log : logs) {
      if (k >= log.size()) continue;
      for (std::uintptr_t s = log[k].at / 32; s <= (log[k].at + log[k].bytes - 1) / 32; ++s) {
        sectors.insert(s);
      }
      if (addresses.insert(log[k].at).second) bytes += log[k].bytes;
    }
    traffic.sectors += static_cast<std::int64_t>(sectors.size());
    traffic.least_sectors += (bytes + 31) / 32;
  }
}

/// Runs a phase: run(i) for every thread of a block in this order.
template <class F>
void run_threads(HostMemory::Block& memory, const std::vector<std::size_t>& order, Traffic* traffic,
                 const F& run) {
  ++memory.phase;
  std::vector<std::vector<Access>> logs(order.size());
  for (const std::size_t i : order) {
    memory.log = &logs[i];
    run(i);
  }
  if (traffic == nullptr) return;
  for (std::size_t i = 0; i < logs.size(); i += 32) {
    const auto end = std::min(i + 32, logs.size());
    count_sectors({logs.begin() + static_cast<std::ptrdiff_t>(i),
                   logs.begin() + static_cast<std::ptrdiff_t>(end)},
                  *traffic);
  }
}

/// One block at work.
template <class Op, class Tile>
class HostBlock {
 public:
  using Body = ScanBlock<Op, Tile, HostMemory>;

  HostBlock(const Op& op, const Schedule& schedule, std::int64_t index, HostMemory::Scratch scratch,
            Traffic* traffic)
      : index_(index),
        traffic_(traffic),
        shared_(std::make_unique<typename Body::Shared>()),
        body_(op, schedule, *shared_, HostMemory(memory_, scratch, traffic)),
        threads_(static_cast<std::size_t>(Tile::kLanes * schedule.rows)) {
    // Shared memory and registers begin with anything: here with numbers that are none.
    std::memset(static_cast<void*>(shared_.get()), 0xFF, sizeof *shared_);
    std::memset(static_cast<void*>(threads_.data()), 0xFF, threads_.size() * sizeof threads_[0]);
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].lane = static_cast<int>(i) % Tile::kLanes;
      threads_[i].row = static_cast<int>(i) / Tile::kLanes;
      order_.push_back(i);
    }
  }

  /// Runs a phase and returns whether the block is done.
  bool step(std::mt19937_64* shuffle) {
    if (shuffle != nullptr) std::shuffle(order_.begin(), order_.end(), *shuffle);
    run_threads(memory_, order_, traffic_,
                [this](std::size_t i) { body_.run(phase_, index_, threads_[i]); });
    const Phase next = body_.after(phase_, threads_[0]);
    for (const auto& thread : threads_) {
      if (body_.after(phase_, thread) != next) throw std::logic_error("threads part ways");
    }
    phase_ = next;
    return phase_ == Phase::kDone;
  }

 private:
  std::int64_t index_;
  Traffic* traffic_;
  HostMemory::Block memory_;
  std::unique_ptr<typename Body::Shared> shared_;
  Body body_;
  std::vector<typename Body::Thread> threads_;
  std::vector<std::size_t> order_;
  Phase phase_ = Phase::kTake;
};

/// All blocks of a launch. Throws where they wait for each other for ever.
template <class Tile, class Op>
void run_grid(const Op& op, const Schedule& schedule, HostMemory::Scratch scratch,
              const Order& order, Traffic* traffic) {
  std::mt19937_64 random(order.seed);
  std::vector<std::int64_t> waiting(static_cast<std::size_t>(schedule.slots * schedule.tiles));
  for (std::size_t i = 0; i < waiting.size(); ++i) {
    waiting[i] = static_cast<std::int64_t>(waiting.size() - 1 - i);
  }
  if (order.resident > 1) std::shuffle(waiting.begin(), waiting.end(), random);
  std::vector<std::unique_ptr<HostBlock<Op, Tile>>> blocks;
  std::int64_t in_vain = 0;
  while (!waiting.empty() || !blocks.empty()) {
    while (!waiting.empty() && blocks.size() < static_cast<std::size_t>(order.resident)) {
      blocks.push_back(
          std::make_unique<HostBlock<Op, Tile>>(op, schedule, waiting.back(), scratch, traffic));
      waiting.pop_back();
    }
    const bool newest = static_cast<int>(random() % 100) < order.newest;
    const std::size_t at = newest ? blocks.size() - 1 : random() % blocks.size();
    const bool done = blocks[at]->step(order.shuffle_threads ? &random : nullptr);
    if (done) blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(at));
    in_vain = done ? 0 : in_vain + 1;
    if (in_vain > 100'000) throw std::runtime_error("blocks wait for each other");
  }
}

}  // namespace gateloop::testing::cuda
