#include "recurrence/cpu/schedule.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/parallel.h"

namespace gateloop::recurrence::cpu {
namespace {

static_assert(kCutBlockSteps % kSavedStateBlock == 0);

std::int64_t div_up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }
std::int64_t round_up(std::int64_t n, std::int64_t d) { return div_up(n, d) * d; }

std::int64_t channels_per_line(const Problem& p) {
  return kCacheLine / static_cast<std::int64_t>(p.storage_bytes);
}

std::int64_t row_lines(const Problem& p) { return div_up(p.shape.channels, channels_per_line(p)); }

bool cuts_time(const Problem& p) {
  return p.shape.batch * row_lines(p) < kCutLines && p.shape.time >= kCutMinSteps;
}

int slots(const Problem& p, int threads) {
  return slots_for(p.shape.batch * p.shape.time * p.shape.channels, threads);
}

/// Channels per unit: as wide as the caches allow, because long rows keep the hardware prefetchers
/// busy. Narrow enough that threads have equal numbers of units, to within a tenth.
std::int64_t tile_channels(const Problem& p, int threads) {
  const std::int64_t line = channels_per_line(p);
  const std::int64_t lines = row_lines(p);
  std::int64_t widest = kTileCarryBytes / static_cast<std::int64_t>(p.carry_bytes);
  if (p.stash_bytes > 0) {
    widest = std::min(widest, kStashBytes / static_cast<std::int64_t>(p.stash_bytes));
  }
  const std::int64_t fewest = div_up(lines, std::max<std::int64_t>(1, widest / line));
  std::int64_t best = fewest;
  double best_use = 0;
  for (std::int64_t tiles = fewest; tiles <= std::min(lines, fewest + threads); ++tiles) {
    const std::int64_t units = p.shape.batch * tiles;
    const double use = static_cast<double>(units) / static_cast<double>(round_up(units, threads));
    if (use > best_use) {
      best = tiles;
      best_use = use;
    }
    if (use > 0.9) break;
  }
  return div_up(lines, best) * line;
}

std::int64_t pipeline_steps(const Problem& p) {
  return kPipelineLines / row_lines(p) / kSavedStateBlock * kSavedStateBlock;
}

/// Whether tiles are narrow because sequences are few, and time is long enough: all threads are
/// then at work nearly all the time.
bool pipelines(const Problem& p, int threads) {
  return p.shape.batch < threads && tile_channels(p, threads) < p.shape.channels &&
         pipeline_steps(p) > 0 && p.shape.time >= 8 * threads * pipeline_steps(p);
}

void load_carry(const Problem& p, const Unit& u, void* carry) {
  const std::size_t bytes = static_cast<std::size_t>(u.channels) * p.carry_bytes;
  if (p.carry_in == nullptr) {
    std::memset(carry, 0, bytes);
  } else {
    const std::size_t at = static_cast<std::size_t>(u.batch * p.shape.channels + u.channel);
    std::memcpy(carry, static_cast<const std::byte*>(p.carry_in) + at * p.carry_bytes, bytes);
  }
}

void store_carry(const Problem& p, const Unit& u, const void* carry) {
  if (p.carry_out == nullptr) return;
  const std::size_t at = static_cast<std::size_t>(u.batch * p.shape.channels + u.channel);
  std::memcpy(static_cast<std::byte*>(p.carry_out) + at * p.carry_bytes, carry,
              static_cast<std::size_t>(u.channels) * p.carry_bytes);
}

std::size_t stash_stride(const Problem& p, std::int64_t tile) {
  return static_cast<std::size_t>(round_up(tile, kCacheLine)) * p.stash_bytes;
}

Unit tile_of(const Problem& p, std::int64_t batch, std::int64_t index, std::int64_t tile) {
  const std::int64_t channel = index * tile;
  return {batch, channel, std::min(tile, p.shape.channels - channel)};
}

/// Each unit from its first step to its last.
void drive_whole(const Problem& p, const Kernel& kernel, const Executor& executor,
                 std::byte* scratch) {
  const int threads = slots(p, executor.threads);
  const std::int64_t tile = tile_channels(p, threads);
  const std::int64_t tiles = div_up(p.shape.channels, tile);
  const std::size_t stash = stash_stride(p, tile);
  parallel(executor, threads, p.shape.batch * tiles, [&](std::int64_t item, std::int64_t slot) {
    const Unit unit = tile_of(p, p.downwards ? p.shape.batch - 1 - item / tiles : item / tiles,
                              item % tiles, tile);
    alignas(kCacheLine) std::byte carry[kTileCarryBytes];
    load_carry(p, unit, carry);
    kernel.scan(unit, {0, p.shape.time}, carry, scratch + static_cast<std::size_t>(slot) * stash);
    store_carry(p, unit, carry);
  });
}

/// A carry that passes from block to block of time, and how many it has passed.
struct alignas(kCacheLine) Baton {
  std::atomic<std::int64_t> passed{0};
  alignas(kCacheLine) std::byte carry[kTileCarryBytes];

  void await(std::int64_t blocks) const {
    // The thread that holds the carry may not be running.
    while (passed.load(std::memory_order_acquire) != blocks) std::this_thread::yield();
  }
  void pass(std::int64_t blocks) { passed.store(blocks + 1, std::memory_order_release); }
};

/// Carries that go from block to block of `length` steps. Calls run(unit, steps, position, baton,
/// stash) for every tile of every block. Blocks come in the order in which the carry passes them,
/// and one thread has all tiles of a block. Blocks are taken in order: the block before any that
/// waits is already under way, so that any number of threads finishes.
template <class Run>
void relay(const Problem& p, std::int64_t tile, std::int64_t length, const Executor& executor,
           std::byte* scratch, const Run& run) {
  const std::int64_t tiles = div_up(p.shape.channels, tile), units = p.shape.batch * tiles;
  const std::int64_t blocks = div_up(p.shape.time, length);
  auto* const batons = reinterpret_cast<Baton*>(scratch);
  std::byte* const stashes = scratch + static_cast<std::size_t>(units) * sizeof(Baton);
  const auto unit = [&](std::int64_t i) { return tile_of(p, i / tiles, i % tiles, tile); };
  for (std::int64_t i = 0; i < units; ++i) load_carry(p, unit(i), (new (batons + i) Baton)->carry);
  std::atomic<std::int64_t> next{0};
  const auto work = [&](std::int64_t slot) {
    std::byte* const stash = stashes + static_cast<std::size_t>(slot) * stash_stride(p, tile);
    const std::int64_t count = p.shape.batch * blocks;
    for (std::int64_t n; (n = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const std::int64_t batch = n % p.shape.batch, position = n / p.shape.batch;
      const std::int64_t begin = (p.adjoint ? blocks - 1 - position : position) * length;
      const Steps steps{begin, std::min(p.shape.time, begin + length)};
      for (std::int64_t i = batch * tiles; i < (batch + 1) * tiles; ++i) {
        run(unit(i), steps, position, batons[i], stash);
      }
    }
  };
  fan_out(executor, slots(p, executor.threads), work);
  for (std::int64_t i = 0; i < units; ++i) store_carry(p, unit(i), batons[i].carry);
}

/// Fewer rows than threads: tiles of a row in parallel, but block by block. One thread computes
/// all tiles of a block, a tile behind the thread of the block before. So a core reads whole rows;
/// where it has a part of every row to itself, its prefetchers fetch the other parts in vain. To
/// fetch the next block row by row while this one is computed took 1.3 times as long, not less.
void drive_pipelined(const Problem& p, const Kernel& kernel, const Executor& executor,
                     std::byte* scratch) {
  const std::int64_t tile = tile_channels(p, slots(p, executor.threads));
  relay(p, tile, pipeline_steps(p), executor, scratch,
        [&](const Unit& unit, Steps steps, std::int64_t position, Baton& baton, std::byte* stash) {
          if (unit.channel == 0) kernel.touch({unit.batch, 0, p.shape.channels}, steps);
          baton.await(position);
          kernel.scan(unit, steps, baton.carry, stash);
          baton.pass(position);
        });
}

/// A narrow sequence, cut in time: what a block does to any carry is computed without it, and with
/// it the carry of the next block; so blocks overlap, and a block is read again while in cache.
void drive_cut(const Problem& p, const Kernel& kernel, const Executor& executor,
               std::byte* scratch) {
  relay(p, p.shape.channels, kCutBlockSteps, executor, scratch,
        [&](const Unit& unit, Steps steps, std::int64_t position, Baton& baton, std::byte* stash) {
          alignas(kCacheLine) std::byte product[kCutRowBytes], sum[kCutRowBytes],
              carry[kCutRowBytes];
          kernel.aggregate(unit, steps, product, sum);
          baton.await(position);
          std::memcpy(carry, baton.carry, static_cast<std::size_t>(unit.channels) * p.carry_bytes);
          kernel.combine(unit.channels, product, sum, baton.carry);
          baton.pass(position);
          kernel.scan(unit, steps, carry, stash);
        });
}

}  // namespace

std::size_t scratch_bytes(const Problem& p, int threads) {
  if (p.shape.batch == 0 || p.shape.channels == 0) return 0;
  const int used = slots(p, threads);
  const std::int64_t tile = cuts_time(p) ? p.shape.channels : tile_channels(p, used);
  const std::int64_t batons =
      cuts_time(p) || pipelines(p, used) ? p.shape.batch * div_up(p.shape.channels, tile) : 0;
  return static_cast<std::size_t>(batons) * sizeof(Baton) +
         static_cast<std::size_t>(used) * stash_stride(p, tile);
}

void drive(const Problem& p, const Kernel& kernel, const Executor& executor, void* scratch) {
  if (p.shape.batch == 0 || p.shape.channels == 0) return;
  const auto way = cuts_time(p)                               ? drive_cut
                   : pipelines(p, slots(p, executor.threads)) ? drive_pipelined
                                                              : drive_whole;
  way(p, kernel, executor, static_cast<std::byte*>(scratch));
}

}  // namespace gateloop::recurrence::cpu
