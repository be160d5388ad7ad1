#pragma once

/// The scratch of a thread that computes chunks of GateLoop.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"

namespace gateloop::recurrence::cpu {

constexpr std::int64_t whole_tiles(std::int64_t n) {
  return (n + kTileColumns - 1) / kTileColumns * kTileColumns;
}

/// Numbers between the rows of a tile: an odd number of groups. The rows of a product's right
/// factor then fall into all sets of the L1 cache.
constexpr std::int64_t tile_stride(std::int64_t columns) {
  return whole_tiles(columns) + (whole_tiles(columns) / kTileColumns % 2 == 0 ? kTileColumns : 0);
}

/// Steps of the chunks in which every key has transitions of its own.
inline constexpr std::int64_t kKeyChunk = gate_loop_chunk(/*per_key=*/true);
static_assert(kKeyChunk == kTileColumns);  // its decays are one group

/// Widths and strides of the tiles. `parts` is 2 where states are complex. `keys` are features of
/// the `key_channels` in memory.
struct TileSizes {
  std::int64_t chunk, key_channels, keys, values, parts;
  bool per_key;
  std::int64_t key_stride, value_stride, step_stride;

  template <class Params>
  explicit TileSizes(const Params& p)
      : chunk(gate_loop_chunk(p.per_key)),
        key_channels(p.shape.keys),
        keys(feature_count(p.feature_map, key_channels)),
        values(p.shape.values),
        parts(p.complex ? 2 : 1),
        per_key(p.per_key),
        key_stride(tile_stride(keys)),
        value_stride(tile_stride(values)),
        step_stride(tile_stride(chunk)) {}
  std::int64_t state() const { return keys * value_stride; }
  /// Numbers that hold a transition of every step, and one transition.
  std::int64_t transitions() const { return per_key ? chunk * key_stride : chunk; }
  std::int64_t transition() const { return per_key ? key_stride : 1; }
};

/// Hands out tiles of scratch; without memory it counts them.
class TileMemory {
 public:
  explicit TileMemory(void* base) : base_(static_cast<std::byte*>(base)) {}

  template <class T>
  T* take(std::int64_t numbers) {
    std::byte* const at = base_ == nullptr ? nullptr : base_ + taken_;
    const auto bytes = static_cast<std::size_t>(numbers) * sizeof(T);
    taken_ += (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<T*>(at);
  }
  std::size_t taken() const { return taken_; }

 private:
  std::byte* base_;
  std::size_t taken_ = 0;
};

/// One chunk going forward; (steps, ...) tiles but for what says otherwise. Arrays of two hold the
/// real and the imaginary part. Transitions are (steps), or (steps, keys) if each key has its own.
template <class T>
struct ForwardTiles {
  T *q, *k, *v, *y;
  T* q_across = nullptr;  // (keys, steps)
  T* k_weighted[2];       // k times the transitions to the end of the chunk
  T* q_weighted[2];       // q times the transitions from its start, the imaginary part negated
  T* decay[2] = {};       // (from, to): the transitions after `from` up to `to`; not per key
  T* scores;              // (from, to)
  T* lanes = nullptr;     // (from, to, lane): the scores of keys that share a lane; per key
  T* a[2];                // transitions
  T* product[2];          // the transitions up to each step
  T* after[2] = {};       // the transitions after each step, per key
  T* state[2];            // (keys, values)
  T* sum[2];              // (keys, values): the chunk's own state

  ForwardTiles(const TileSizes& n, TileMemory& memory) {
    const auto keys = [&] { return memory.take<T>(n.chunk * n.key_stride); };
    const auto values = [&] { return memory.take<T>(n.chunk * n.value_stride); };
    const auto square = [&] { return memory.take<T>(n.chunk * n.step_stride); };
    q = keys(), k = keys(), v = values(), y = values(), scores = square();
    if (n.per_key) {
      lanes = memory.take<T>(n.chunk * n.chunk * kTileColumns);
    } else {
      q_across = memory.take<T>(n.keys * n.step_stride);
    }
    for (int part = 0; part < 2; ++part) {
      k_weighted[part] = keys(), q_weighted[part] = keys();
      a[part] = memory.take<T>(n.transitions()), product[part] = memory.take<T>(n.transitions());
      if (n.per_key) {
        after[part] = memory.take<T>(n.transitions());
      } else {
        decay[part] = square();
      }
      state[part] = memory.take<T>(n.state()), sum[part] = memory.take<T>(n.state());
    }
  }
};

/// One chunk going back.
template <class T>
struct BackwardTiles : ForwardTiles<T> {
  T *dy, *dq, *dk, *dv;
  T* dy_across;        // (values, steps)
  T* similarities;     // (from, to): v · dy
  T* state_across[2];  // (values, keys)
  T* carry[2];         // (keys, values): the gradient of the state after the chunk
  T* carry_across[2];  // (values, keys)
  T* read[2];          // (steps, keys): dy times the state before the chunk
  T* written[2];       // (steps, keys): v times the carry
  T* gathered[2];      // transitions: what the gradients of later ones gather of earlier ones
  T* last[2];          // (1) or (keys): the same of the products that end at the carry
  T* da[2];            // transitions

  BackwardTiles(const TileSizes& n, TileMemory& memory) : ForwardTiles<T>(n, memory) {
    const auto keys = [&] { return memory.take<T>(n.chunk * n.key_stride); };
    const auto values = [&] { return memory.take<T>(n.chunk * n.value_stride); };
    dy = values(), dq = keys(), dk = keys(), dv = values();
    dy_across = memory.take<T>(n.values * n.step_stride);
    similarities = memory.take<T>(n.chunk * n.step_stride);
    for (int part = 0; part < 2; ++part) {
      state_across[part] = memory.take<T>(n.values * n.key_stride);
      carry_across[part] = memory.take<T>(n.values * n.key_stride);
      carry[part] = memory.take<T>(n.state());
      read[part] = keys(), written[part] = keys();
      gathered[part] = memory.take<T>(n.transitions()), da[part] = memory.take<T>(n.transitions());
      last[part] = memory.take<T>(n.transition());
    }
  }
};

/// One chunk of heads that go step by step: rows of keys, of values and of transitions. A forward
/// call leaves those for going back unused.
template <class T>
struct StepTiles {
  T *q, *k, *v, *y;
  T* a[2];
  T* state[2];  // (keys, values): going back, before the chunk
  // Going back:
  T *dy, *dq, *dk, *dv;
  T* da[2];
  T* da_lanes;  // (steps, parts, kTileColumns)
  T* carry[2];  // (keys, values): the gradient of the state after the chunk
  T* stash;     // (steps + 1, parts, keys, kTileColumns): a block before each step and at the end

  StepTiles(const TileSizes& n, TileMemory& memory) {
    const auto keys = [&] { return memory.take<T>(n.chunk * n.key_stride); };
    const auto values = [&] { return memory.take<T>(n.chunk * n.value_stride); };
    const auto state_tile = [&] { return memory.take<T>(whole_tiles(n.keys) * n.value_stride); };
    q = keys(), k = keys(), v = values(), y = values();
    dy = values(), dq = keys(), dk = keys(), dv = values();
    for (int part = 0; part < 2; ++part) {
      // Rows of transitions are no wider than a row of keys: n.transition(), or kTileColumns.
      a[part] = keys(), da[part] = keys();
      state[part] = state_tile(), carry[part] = state_tile();
    }
    da_lanes = memory.take<T>(n.chunk * n.parts * kTileColumns);
    stash = memory.take<T>((n.chunk + 1) * n.parts * kStepBlockKeys * kTileColumns);
  }
};

/// Bytes of a thread's tiles.
template <class Tiles>
std::size_t tile_bytes(const TileSizes& n) {
  TileMemory memory(nullptr);
  const Tiles tiles(n, memory);
  return memory.taken();
}
/// The tiles of a thread; those of all lie one behind the other from `base` on.
template <class Tiles>
Tiles tiles_of(std::int64_t slot, const TileSizes& n, void* base) {
  TileMemory memory(static_cast<std::byte*>(base) +
                    static_cast<std::size_t>(slot) * tile_bytes<Tiles>(n));
  return Tiles(n, memory);
}

}  // namespace gateloop::recurrence::cpu
