#include "recurrence/cpu/schedule.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "recurrence/cpu/constants.h"

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
  return p.shape.batch * lines < kCutLines && p.shape.time >= kCutMinSteps;
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

/// Calls body(item, slot) for every item; a slot is one thread's at a time.
template <class Body>
void parallel(const Executor& executor, int slots, std::int64_t items, const Body& body) {
  const std::int64_t used = executor.parallel_for ? std::min<std::int64_t>(slots, items) : 1;
  if (used <= 1) {
    for (std::int64_t i = 0; i < items; ++i) body(i, 0);
    return;
  }
  // Sixteen turns a slot even out uneven threads and make the counter free.
  const std::int64_t turn = std::max<std::int64_t>(1, items / (used * 16));
  std::atomic<std::int64_t> next{0};
  executor.parallel_for(used, [&](std::int64_t slot) {
    for (std::int64_t i; (i = next.fetch_add(turn, std::memory_order_relaxed)) < items;) {
      for (const std::int64_t end = std::min(items, i + turn); i < end; ++i) body(i, slot);
    }
  });
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

/// Scratch of a cut scan: (B, kPanelBlocks, D) products, sums and carries, then the stashes.
struct CutScratch {
  std::size_t row;  // bytes of one (D) carry
  std::byte *product, *sum, *carry, *stash;

  static std::size_t section(const Problem& p) {
    return static_cast<std::size_t>(p.shape.batch * kPanelBlocks) * row_bytes(p);
  }
  static std::size_t row_bytes(const Problem& p) {
    return static_cast<std::size_t>(
        round_up(p.shape.channels * static_cast<std::int64_t>(p.carry_bytes), kCacheLine));
  }
  CutScratch(const Problem& p, std::byte* scratch)
      : row(row_bytes(p)),
        product(scratch),
        sum(product + section(p)),
        carry(sum + section(p)),
        stash(carry + section(p)) {}
};

/// Three phases a panel: what each block does to a carry, the carry at the start of each block,
/// then the blocks. Panels follow one another, so scratch does not grow with time.
void drive_cut(const Problem& p, const Kernel& kernel, const Executor& executor,
               std::byte* scratch) {
  const int threads = slots(p, executor.threads);
  const CutScratch s(p, scratch);
  const std::size_t stash = stash_stride(p, p.shape.channels);
  const std::int64_t batch = p.shape.batch, channels = p.shape.channels;
  const std::int64_t blocks = div_up(p.shape.time, kCutBlockSteps);
  const auto unit = [&](std::int64_t b) { return Unit{b, 0, channels}; };
  const auto at = [&](std::byte* section, std::int64_t b, std::int64_t position) {
    return section + static_cast<std::size_t>(b * kPanelBlocks + position) * s.row;
  };
  for (std::int64_t b = 0; b < batch; ++b) load_carry(p, unit(b), at(s.carry, b, 0));

  for (std::int64_t first = 0; first < blocks; first += kPanelBlocks) {
    const std::int64_t count = std::min(kPanelBlocks, blocks - first);
    const auto steps = [&](std::int64_t position) {  // position in the order of the scan
      const std::int64_t block = p.adjoint ? blocks - 1 - first - position : first + position;
      return Steps{block * kCutBlockSteps, std::min(p.shape.time, (block + 1) * kCutBlockSteps)};
    };
    parallel(executor, threads, batch * (count - 1), [&](std::int64_t item, std::int64_t) {
      const std::int64_t b = item / (count - 1), k = item % (count - 1);
      kernel.aggregate(unit(b), steps(k), at(s.product, b, k), at(s.sum, b, k));
    });
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t k = 0; k + 1 < count; ++k) {
        std::memcpy(at(s.carry, b, k + 1), at(s.carry, b, k), s.row);
        kernel.combine(channels, at(s.product, b, k), at(s.sum, b, k), at(s.carry, b, k + 1));
      }
    }
    parallel(executor, threads, batch * count, [&](std::int64_t item, std::int64_t slot) {
      const std::int64_t b = item / count, k = item % count;
      kernel.scan(unit(b), steps(k), at(s.carry, b, k),
                  s.stash + static_cast<std::size_t>(slot) * stash);
    });
    for (std::int64_t b = 0; b < batch; ++b) {
      if (count > 1) std::memcpy(at(s.carry, b, 0), at(s.carry, b, count - 1), s.row);
    }
  }
  for (std::int64_t b = 0; b < batch; ++b) store_carry(p, unit(b), at(s.carry, b, 0));
}

}  // namespace

std::size_t scratch_bytes(const Problem& p, int threads) {
  if (p.shape.batch == 0 || p.shape.channels == 0) return 0;
  const auto used = static_cast<std::size_t>(slots(p, threads));
  if (cuts_time(p)) {
    return 3 * CutScratch::section(p) + used * stash_stride(p, p.shape.channels);
  }
  return used * stash_stride(p, tile_channels(p, slots(p, threads)));
}

void drive(const Problem& p, const Kernel& kernel, const Executor& executor, void* scratch) {
  if (p.shape.batch == 0 || p.shape.channels == 0) return;
  (cuts_time(p) ? drive_cut : drive_whole)(p, kernel, executor, static_cast<std::byte*>(scratch));
}

}  // namespace gateloop::recurrence::cpu
