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

static_assert(kCutBlockSteps % kCheckpointBlock == 0);

std::int64_t div_up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }
std::int64_t round_up(std::int64_t n, std::int64_t d) { return div_up(n, d) * d; }

std::int64_t channels_per_line(const Problem& p) {
  return kCacheLine / static_cast<std::int64_t>(p.storage_bytes);
}

bool cuts_time(const Problem& p) {
  const std::int64_t lines = div_up(p.shape.channels, channels_per_line(p));
  const std::int64_t limit = p.cheap_aggregate ? kCheapCutLines : kCutLines;
  return p.shape.batch * lines < limit && p.shape.time >= kCutMinSteps;
}

std::int64_t cut_block_steps(const Problem& p) {
  const std::int64_t lines = div_up(p.shape.channels, channels_per_line(p));
  const std::int64_t steps = kCutBlockLines / lines / kCheckpointBlock * kCheckpointBlock;
  return std::clamp(steps, kCheckpointBlock, kCutBlockSteps);
}

int slots(const Problem& p, int threads) {
  const std::int64_t elements = p.shape.batch * p.shape.time * p.shape.channels;
  return elements < kInlineElements ? 1 : std::max(1, threads);
}

/// Channels per unit: as wide as the caches allow, for long rows keep the hardware prefetchers
/// busy, but narrow enough to give every thread the same number of units (to within a tenth).
std::int64_t tile_channels(const Problem& p, int threads) {
  const std::int64_t line = channels_per_line(p);
  const std::int64_t lines = div_up(p.shape.channels, line);
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

void drive_whole(const Problem& p, const Kernel& kernel, const Executor& executor,
                 std::byte* scratch) {
  const int threads = slots(p, executor.threads);
  const std::int64_t tile = tile_channels(p, threads);
  const std::int64_t tiles = div_up(p.shape.channels, tile);
  const std::size_t stash = stash_stride(p, tile);
  parallel(executor, threads, p.shape.batch * tiles, [&](std::int64_t item, std::int64_t slot) {
    const std::int64_t channel = item % tiles * tile;
    const std::int64_t turn = item / tiles;
    const Unit unit{p.downwards ? p.shape.batch - 1 - turn : turn, channel,
                    std::min(tile, p.shape.channels - channel)};
    alignas(kCacheLine) std::byte carry[kTileCarryBytes];
    load_carry(p, unit, carry);
    kernel.scan(unit, {0, p.shape.time}, carry, scratch + static_cast<std::size_t>(slot) * stash);
    store_carry(p, unit, carry);
  });
}

/// The carry of one batch entry as it passes from block to block, and how many it has passed.
struct alignas(kCacheLine) Baton {
  std::atomic<std::int64_t> passed{0};
  std::byte carry[kCutRowBytes];

  void await(std::int64_t blocks) const {
    // The thread that holds the carry may not be running.
    while (passed.load(std::memory_order_acquire) != blocks) std::this_thread::yield();
  }
  void pass(std::int64_t blocks) { passed.store(blocks + 1, std::memory_order_release); }
};

/// Few channels, cut in time: what a block does to any carry is computed without it, and with
/// it the carry of the next block; so blocks overlap, and a block is read again while in cache.
/// Blocks are taken in order and wait only for blocks that a running thread has taken before, so
/// any number of threads gets through.
void drive_cut(const Problem& p, const Kernel& kernel, const Executor& executor,
               std::byte* scratch) {
  const int threads = executor.parallel_for ? slots(p, executor.threads) : 1;
  const std::int64_t batch = p.shape.batch, length = cut_block_steps(p);
  const std::int64_t blocks = div_up(p.shape.time, length);
  const std::size_t carry_bytes = static_cast<std::size_t>(p.shape.channels) * p.carry_bytes;
  const auto unit = [&](std::int64_t b) { return Unit{b, 0, p.shape.channels}; };
  auto* const batons = reinterpret_cast<Baton*>(scratch);
  std::byte* const stashes = scratch + static_cast<std::size_t>(batch) * sizeof(Baton);
  for (std::int64_t b = 0; b < batch; ++b) load_carry(p, unit(b), (new (batons + b) Baton)->carry);

  const auto run_block = [&](std::int64_t b, std::int64_t position, std::byte* stash) {
    const std::int64_t block = p.adjoint ? blocks - 1 - position : position;
    const Steps steps{block * length, std::min(p.shape.time, (block + 1) * length)};
    alignas(kCacheLine) std::byte product[kCutRowBytes], sum[kCutRowBytes], carry[kCutRowBytes];
    kernel.aggregate(unit(b), steps, product, sum);
    batons[b].await(position);
    std::memcpy(carry, batons[b].carry, carry_bytes);
    kernel.combine(p.shape.channels, product, sum, batons[b].carry);
    batons[b].pass(position);
    kernel.scan(unit(b), steps, carry, stash);
  };
  std::atomic<std::int64_t> next{0};
  const auto work = [&](std::int64_t slot) {
    std::byte* const stash =
        stashes + static_cast<std::size_t>(slot) * stash_stride(p, p.shape.channels);
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < batch * blocks;) {
      run_block(i % batch, i / batch, stash);
    }
  };
  threads > 1 ? executor.parallel_for(threads, work) : work(0);
  for (std::int64_t b = 0; b < batch; ++b) store_carry(p, unit(b), batons[b].carry);
}

}  // namespace

std::size_t scratch_bytes(const Problem& p, int threads) {
  if (p.shape.batch == 0 || p.shape.channels == 0) return 0;
  const auto used = static_cast<std::size_t>(slots(p, threads));
  if (cuts_time(p)) {
    return static_cast<std::size_t>(p.shape.batch) * sizeof(Baton) +
           used * stash_stride(p, p.shape.channels);
  }
  return used * stash_stride(p, tile_channels(p, slots(p, threads)));
}

void drive(const Problem& p, const Kernel& kernel, const Executor& executor, void* scratch) {
  if (p.shape.batch == 0 || p.shape.channels == 0) return;
  (cuts_time(p) ? drive_cut : drive_whole)(p, kernel, executor, static_cast<std::byte*>(scratch));
}

}  // namespace gateloop::recurrence::cpu
