#pragma once

/// How a call of GateLoop is cut into sequences, units and chunks.
#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/parallel.h"

namespace gateloop::recurrence::cpu {

/// The sequences of a call: batch entries, or what offsets cut along time.
struct Sequences {
  std::int64_t batch, time;
  Offsets offsets;

  template <class Params>
  explicit Sequences(const Params& p)
      : batch(p.shape.batch), time(p.shape.time), offsets(p.offsets) {}
  std::int64_t count() const { return offsets.empty() ? batch : std::ssize(offsets) - 1; }
  std::int64_t begin(std::int64_t n) const {
    return offsets.empty() ? 0 : offsets[static_cast<std::size_t>(n)];
  }
  std::int64_t length(std::int64_t n) const {
    return offsets.empty() ? time : offsets[static_cast<std::size_t>(n) + 1] - begin(n);
  }
  std::int64_t longest() const {
    std::int64_t most = 0;
    for (std::int64_t n = 0; n < count(); ++n) most = std::max(most, length(n));
    return most;
  }
};

/// Whether a call goes step by step and not in chunks.
template <class Params>
bool is_stepwise(const Params& p) {
  const std::int64_t numbers = feature_count(p.feature_map, p.shape.keys) * p.shape.values;
  const bool is_simple = !p.complex && !p.per_key;
  return numbers > 0 && numbers <= (is_simple ? kStepwiseRealNumbers : kStepwiseNumbers);
}
/// Heads of `width` keys and as many values, of which vectors may hold several.
template <class Params>
bool can_share_vectors(const Params& p, std::int64_t width) {
  return p.shape.keys == width && p.shape.values == width && p.feature_map == FeatureMap::kNone;
}

/// How a call is cut. Its units are heads of sequences. Where they would leave threads idle, chunks
/// are units as well: all chunks' own states first, then the states before each, then the rest.
/// Either way computes the same numbers in the same order.
struct ChunkPlan {
  std::int64_t units, chunks;  // chunks of the longest unit
  int slots;
  bool cut;

  template <class Params>
  ChunkPlan(const Params& p, int threads)
      : units(Sequences(p).count() * p.shape.heads),
        chunks(gate_loop_chunks(Sequences(p).longest(), p.per_key)),
        slots(slots_for(p.shape.batch * p.shape.heads * p.shape.time *
                            (feature_count(p.feature_map, p.shape.keys) * p.shape.values + 1),
                        threads)),
        cut(chunks > 1 && units * 4 < 3 * ((units + slots - 1) / slots * slots)) {}
};

/// The state before each chunk and after the last one, in planes of (keys, values) tiles; and the
/// transitions over each chunk.
template <class T>
struct ChunkStates {
  std::int64_t size = 0, chunks = 0, parts = 1, width = 1;
  T* states = nullptr;
  std::array<T, 2>* products = nullptr;

  ChunkStates(const TileSizes& n, const ChunkPlan& plan, TileMemory& memory)
      : size(n.state()), chunks(plan.chunks), parts(n.parts), width(n.transition()) {
    if (!plan.cut) return;
    states = memory.take<T>(plan.units * (plan.chunks + 1) * parts * size);
    products = memory.take<std::array<T, 2>>(plan.units * plan.chunks * width);
  }
  std::array<T*, 2> state(std::int64_t unit, std::int64_t chunk) const {
    T* const first = states + (unit * (chunks + 1) + chunk) * parts * size;
    return {first, first + (parts - 1) * size};
  }
  std::array<T, 2>& product(std::int64_t unit, std::int64_t chunk, std::int64_t key) const {
    return products[(unit * chunks + chunk) * width + (width == 1 ? 0 : key)];
  }
};

}  // namespace gateloop::recurrence::cpu
