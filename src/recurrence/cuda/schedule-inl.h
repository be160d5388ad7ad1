#pragma once

/// Which steps and channels a block of threads has, and where they lie.
#include <cstdint>
#include <type_traits>

#include "gateloop/recurrence.h"
#include "recurrence/cuda/launch_table.h"
#include "recurrence/cuda/numbers-inl.h"

namespace gateloop::recurrence::cuda {

/// A block of kLanes x kRows threads: lane l has kChannels adjacent channels, and row r has kSteps
/// steps of them. The block has a chunk of kRows kSteps steps.
template <Launch kLaunch>
struct Tile {
  static constexpr int kLanes = kLaunch.lanes, kRows = kLaunch.rows;
  static constexpr int kSteps = kLaunch.steps, kChannels = kLaunch.channels;
  static constexpr int kBlocks = kLaunch.blocks;  // that an SM holds at least
  static constexpr int kThreads = kLanes * kRows;
  static constexpr int kChunk = kRows * kSteps;
  static constexpr int kWidth = kLanes * kChannels;
};

/// What is the same for all blocks of a launch. A slot is the place of one chunk of one sequence in
/// scratch, for every tile of channels.
struct Schedule {
  std::int64_t channels = 0, time = 0, sequences = 0;
  const std::int64_t* offsets = nullptr;  // (sequences + 1) in device memory, or null
  bool reverse = false;
  int rows = 1;            // of threads in a block
  std::int64_t slots = 0;  // some stay empty beside offsets
  std::int64_t tiles = 0;
  /// Null where every sequence is one chunk: nothing is carried from block to block.
  unsigned* ticket = nullptr;
  unsigned* flags = nullptr;  // (slots, tiles): see Carried
  void* carries = nullptr;    // (slots, planes, tiles, width): see ScanBlock
};

/// Of one block.
struct Where {
  std::int64_t slot, tile;
  std::int64_t sequence;   // row of the states
  std::int64_t batch;      // of the arrays
  std::int64_t first;      // step of the arrays that is step 0 of the sequence
  std::int64_t direction;  // in which the next one lies: 1 or -1
  std::int64_t length;     // steps of the sequence
  std::int64_t chunk;      // from its step 0 on
  std::int64_t ordinal;    // chunks that come before in the order of the scan
  std::int64_t saved;      // row of the saved states of step 0
  bool last;               // in the order of the scan
  bool whole;              // all its steps and channels exist
  bool empty;              // a slot that no chunk uses
};

/// Where a thread's steps and channels lie in arrays.
struct Place {
  std::int64_t sequence;  // row of the states
  std::int64_t batch, channel;
  std::int64_t time;  // step of the arrays that is its first step
  bool start;         // its first step is that of the sequence
  int valid;          // how many of its channels there are
  static constexpr bool kWhole = false;
};
/// Of a block that is whole, in arrays that are all given and read in whole accesses: no access
/// has a condition.
struct WholePlace : Place {
  static constexpr bool kWhole = true;
};
/// The same channels in an array that has rows and no time: states, saved states.
GATELOOP_HD Place row_of(std::int64_t row, const Place& p) {
  return {row, row, p.channel, 0, false, p.valid};
}
GATELOOP_HD Place state_row(const Place& p) { return row_of(p.sequence, p); }

/// Of numbers below 2^32.
GATELOOP_HD std::int64_t quotient(std::int64_t n, std::int64_t d) {
  return static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(d);
}
GATELOOP_HD std::int64_t div_up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

/// A sequence without a step has a chunk too, which hands its state on.
GATELOOP_HD std::int64_t chunks_of(std::int64_t length, std::int64_t chunk) {
  return length <= 0 ? 1 : div_up(length, chunk);
}

/// Largest n with at most `slot` slots before sequence n, by the rule of saved_state_count.
template <class Memory>
GATELOOP_HD std::int64_t sequence_at(const Schedule& s, std::int64_t chunk, std::int64_t slot,
                                     Memory& memory) {
  std::int64_t low = 0, high = s.sequences;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (memory.load(s.offsets + middle) / chunk + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Tickets are drawn in ascending order, and chunk `ordinal` has a higher one than those before it:
/// a block waits only for blocks that run already.
template <class Tile, bool kBackwards, class Memory>
GATELOOP_HD Where locate(const Schedule& s, std::int64_t ticket, Memory& memory) {
  Where w{};
  // A launch has at most 2^31 - 1 blocks. 64-bit divisions would take a microsecond of every block.
  const std::int64_t item = quotient(ticket, s.tiles);
  w.tile = ticket - item * s.tiles;
  std::int64_t begin = 0, chunks;
  if (s.offsets == nullptr) {
    w.length = s.time;
    chunks = chunks_of(w.length, Tile::kChunk);
    w.ordinal = quotient(item, s.sequences);
    w.sequence = w.batch = item - w.ordinal * s.sequences;
    w.chunk = kBackwards ? chunks - 1 - w.ordinal : w.ordinal;
    w.slot = w.sequence * chunks + w.chunk;
    w.saved = w.sequence * saved_state_count(s.time);
  } else {
    w.slot = kBackwards ? s.slots - 1 - item : item;
    w.sequence = sequence_at(s, Tile::kChunk, w.slot, memory);
    begin = memory.load(s.offsets + w.sequence);
    w.length = memory.load(s.offsets + w.sequence + 1) - begin;
    chunks = chunks_of(w.length, Tile::kChunk);
    w.chunk = w.slot - (begin / Tile::kChunk + w.sequence);
    w.empty = w.chunk >= chunks;
    w.ordinal = kBackwards ? chunks - 1 - w.chunk : w.chunk;
    w.saved = saved_state_count(begin, w.sequence);
  }
  w.first = s.reverse ? begin + w.length - 1 : begin;
  w.direction = s.reverse ? -1 : 1;
  w.last = w.ordinal == chunks - 1;
  w.whole = !w.empty && w.length - w.chunk * Tile::kChunk >= Tile::kChunk &&
            s.channels - w.tile * Tile::kWidth >= Tile::kWidth;
  return w;
}

/// A (B, T, D) sequence of kParts reals a channel, of which a thread reads kChannels channels at
/// once: in one access where `wide`: each is aligned to its size then.
template <class S, int kParts, int kChannels>
struct View {
  static constexpr int kReals = kParts * kChannels;
  S* data = nullptr;
  std::int64_t batch_stride = 0, time_stride = 0;  // in reals
  std::int64_t step_stride = 0;  // from a step of a sequence to its next: reversed, -time_stride
  std::int32_t step_bytes = 0;   // the same, where it is small enough for `whole` blocks
  bool wide = false;

  GATELOOP_HD bool is_null() const { return data == nullptr; }
  /// A step of the thread, from its first on.
  GATELOOP_HD S* at(const Place& p, int step) const {
    return data + p.batch * batch_stride + p.time * time_stride + p.channel * kParts +
           step * step_stride;
  }
  /// One instruction a step: the product of two 32-bit numbers is added to the first address.
  GATELOOP_HD auto* at(const WholePlace& p, int step) const {
    using Whole = std::conditional_t<std::is_const_v<S>, const Lane<std::remove_const_t<S>, kReals>,
                                     Lane<S, kReals>>;
    using Byte = std::conditional_t<std::is_const_v<S>, const char, char>;
    auto* const first = reinterpret_cast<Byte*>(at(static_cast<const Place&>(p), 0));
    return reinterpret_cast<Whole*>(first + static_cast<std::int64_t>(step) * step_bytes);
  }
  /// Channels that do not exist, and all of a null sequence, read as zeros.
  template <class Memory, class AnyPlace>
  GATELOOP_HD auto load(Memory& memory, const AnyPlace& p, int step) const {
    using Stored = std::remove_const_t<S>;
    if constexpr (AnyPlace::kWhole) return memory.load(at(p, step));
    Lane<Stored, kReals> lane{};
    if (is_null()) return lane;
    const S* const from = at(static_cast<const Place&>(p), step);
    if constexpr (kReals > 1) {
      if (wide && p.valid == kChannels) {
        return memory.load(reinterpret_cast<const Lane<Stored, kReals>*>(from));
      }
    }
    GATELOOP_UNROLL
    for (int i = 0; i < kReals; ++i) {
      if (i < p.valid * kParts) lane.set(i, memory.load(from + i));
    }
    return lane;
  }
  template <class Memory, class AnyPlace>
  GATELOOP_HD void store(Memory& memory, const AnyPlace& p, int step,
                         const Lane<S, kReals>& lane) const {
    if constexpr (AnyPlace::kWhole) return memory.store(at(p, step), lane);
    S* const to = at(static_cast<const Place&>(p), step);
    if constexpr (kReals > 1) {
      if (wide && p.valid == kChannels) {
        return memory.store(reinterpret_cast<Lane<S, kReals>*>(to), lane);
      }
    }
    GATELOOP_UNROLL
    for (int i = 0; i < kReals; ++i) {
      if (i < p.valid * kParts) memory.store(to + i, lane.get(i));
    }
  }
};

}  // namespace gateloop::recurrence::cuda
