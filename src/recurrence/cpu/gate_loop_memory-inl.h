// Which steps a chunk of GateLoop has, and moving them between memory and tiles.
#include <hwy/cache_control.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/gate_loop_plan.h"
#include "recurrence/cpu/rows-inl.h"
#include "recurrence/features.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_MEMORY_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_MEMORY_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_MEMORY_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_MEMORY_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// The rows of (B, T, H, C).
class HeadRows {
 public:
  template <class Any>
  HeadRows(const Any& heads, std::size_t element)
      : data_(static_cast<const std::byte*>(heads.data)),
        batch_stride_(heads.batch_stride * static_cast<std::int64_t>(element)),
        time_stride_(heads.time_stride * static_cast<std::int64_t>(element)),
        head_stride_(heads.head_stride * static_cast<std::int64_t>(element)) {}
  bool IsNull() const { return data_ == nullptr; }
  template <class S>
  S* At(std::int64_t batch, std::int64_t head, std::int64_t time) const {
    const std::byte* const row =
        data_ + batch * batch_stride_ + head * head_stride_ + time * time_stride_;
    return reinterpret_cast<S*>(const_cast<std::byte*>(row));
  }

 private:
  const std::byte* data_;
  std::int64_t batch_stride_, time_stride_, head_stride_;
};

/// What a forward call reads and writes.
struct ForwardRows {
  HeadRows q, k, v, y;

  explicit ForwardRows(const GateLoop& p)
      : q(p.q, storage_bytes(p.dtype)),
        k(p.k, storage_bytes(p.dtype)),
        v(p.v, storage_bytes(p.dtype)),
        y(p.y, storage_bytes(p.dtype)) {}
};

/// The same of a backward call.
struct BackwardRows {
  HeadRows q, k, v, dy, dq, dk, dv, da;

  /// `transition`: bytes of one number of da.
  BackwardRows(const GateLoopBackward& p, std::size_t transition)
      : q(p.q, storage_bytes(p.dtype)),
        k(p.k, storage_bytes(p.dtype)),
        v(p.v, storage_bytes(p.dtype)),
        dy(p.dy, storage_bytes(p.dtype)),
        dq(p.dq, storage_bytes(p.dtype)),
        dk(p.dk, storage_bytes(p.dtype)),
        dv(p.dv, storage_bytes(p.dtype)),
        da(p.da, transition) {}
};

/// What both directions share: which steps a chunk has, and moving them between memory and tiles.
template <class T_, int kParts, bool kPerKey>
class Chunks {
 public:
  using T = T_;

  template <class Params>
  explicit Chunks(const Params& p)
      : n(p),
        heads_(p.shape.heads),
        reverse_(p.reverse),
        sequences_(p),
        dtype_(p.dtype),
        feature_map_(p.feature_map),
        a_(p.a, kParts * sizeof(T)) {}

  std::int64_t ChunksOf(std::int64_t unit) const {
    return gate_loop_chunks(sequences_.length(unit / heads_), kPerKey);
  }

 protected:
  /// The steps of a chunk: step s in scan order is at first + s * direction in time.
  struct Place {
    std::int64_t batch, head, first, direction, steps;
    std::int64_t saved;  // the chunk's number among those with saved states
    bool begins;         // its sequence
    // Of the chunk that a thread reads next: its distance in time from this one, and its steps,
    // none where there is no such chunk.
    std::int64_t to_next, next_steps;

    std::int64_t time(std::int64_t s) const { return first + s * direction; }
  };
  Place PlaceOf(std::int64_t unit, std::int64_t chunk, std::int64_t next) const {
    const std::int64_t sequence = unit / heads_, done = chunk * n.chunk;
    const std::int64_t begin = sequences_.begin(sequence), length = sequences_.length(sequence);
    const bool packed = !sequences_.offsets.empty();
    const std::int64_t saved_before = packed ? gate_loop_chunks(begin, sequence, kPerKey)
                                             : sequence * gate_loop_chunks(length, kPerKey);
    return {.batch = packed ? 0 : sequence,
            .head = unit % heads_,
            .first = begin + (reverse_ ? length - 1 - done : done),
            .direction = reverse_ ? -1 : 1,
            .steps = std::min(n.chunk, length - done),
            .saved = saved_before + chunk,
            .begins = chunk == 0,
            .to_next = (next - chunk) * n.chunk * (reverse_ ? -1 : 1),
            .next_steps = next < 0 ? 0 : std::min(n.chunk, length - next * n.chunk)};
  }

  /// f.template operator()<S>() with S the storage type of the sequences.
  template <class F>
  void WithStorage(const F& f) const {
    WithStorageOf(dtype_, [&]<class S>() {
      if constexpr (std::is_same_v<Accumulation<S>, T>) f.template operator()<S>();
    });
  }
  void Load(const HeadRows& from, const Place& at, std::int64_t columns, T* tile,
            std::int64_t stride) const {
    WithStorage([&]<class S>() {
      for (std::int64_t s = 0; s < at.steps; ++s) {
        T* const row = tile + s * stride;
        if (from.IsNull()) {
          std::fill_n(row, columns, T(0));
        } else {
          PrefetchNext<S>(from, at, s, columns);
          Widen(from.template At<const S>(at.batch, at.head, at.time(s)), columns, row);
        }
        std::fill(row + columns, row + whole_tiles(columns), T(0));
      }
    });
  }
  void Store(const T* tile, std::int64_t stride, const Place& at, std::int64_t columns,
             const HeadRows& to) const {
    WithStorage([&]<class S>() {
      for (std::int64_t s = 0; s < at.steps; ++s) {
        S* const row = to.template At<S>(at.batch, at.head, at.time(s));
        ForEachVector<T>(columns, [&](auto d, std::int64_t c) HWY_ATTR {
          StoreReal(d, hn::LoadU(d, tile + s * stride + c), row + c, /*stream=*/false);
        });
      }
    });
  }
  /// The row of step s in the next chunk. Between two rows of a head lie those of the others, a gap
  /// that hardware prefetchers do not follow. Inlined always: g++ 12 drops calls of functions that
  /// only prefetch. Heads of 2, 1,024 steps: 2.7 -> 1.8 ms, of 64 5.6 -> 5.1 (Zen 4).
  template <class S>
  static HWY_INLINE void PrefetchNext(const HeadRows& from, const Place& at, std::int64_t s,
                                      std::int64_t columns) {
    if (s >= at.next_steps) return;
    const S* const row = from.template At<const S>(at.batch, at.head, at.time(s) + at.to_next);
    constexpr std::int64_t kLine = kCacheLine / static_cast<std::int64_t>(sizeof(S));
    for (std::int64_t c = 0; c < columns; c += kLine) hwy::Prefetch(row + c);
  }
  /// Queries or keys, as their features.
  void LoadKeys(const HeadRows& from, const Place& at, T* tile) const {
    if (feature_map_ == FeatureMap::kNone) return Load(from, at, n.keys, tile, n.key_stride);
    WithStorage([&]<class S>() {
      for (std::int64_t s = 0; s < at.steps; ++s) {
        T* const row = tile + s * n.key_stride;
        // The channels are among the features, in their second place.
        Widen(from.template At<const S>(at.batch, at.head, at.time(s)), n.key_channels, row + 1);
        taylor_features(row + 1, n.key_channels, row);
        std::fill(row + n.keys, row + whole_tiles(n.keys), T(0));
      }
    });
  }
  /// From the gradient of the features in `tile`, which changes; `rows`: what LoadKeys loaded.
  void StoreKeys(const T* rows, T* tile, const Place& at, const HeadRows& to) const {
    if (feature_map_ == FeatureMap::kTaylor) {
      for (std::int64_t s = 0; s < at.steps; ++s) {
        const std::int64_t row = s * n.key_stride;
        taylor_gradient(rows + row + 1, tile + row, n.key_channels, tile + row);
      }
    }
    Store(tile, n.key_stride, at, n.key_channels, to);
  }
  void LoadTransitions(const Place& at, T* const* a) const {
    const std::int64_t width = kPerKey ? n.keys : 1;
    for (std::int64_t s = 0; s < at.steps; ++s) {
      const T* const from = a_.template At<const T>(at.batch, at.head, at.time(s));
      for (int part = 0; part < kParts; ++part) {
        T* const to = a[part] + s * n.transition();
        for (std::int64_t k = 0; k < width; ++k) to[k] = from[k * kParts + part];
        if constexpr (kPerKey) std::fill(to + n.keys, to + whole_tiles(n.keys), T(0));
      }
    }
  }

  void StoreTransitions(T* const* da, const Place& at, const HeadRows& to) const {
    for (std::int64_t s = 0; s < at.steps; ++s) {
      T* const row = to.template At<T>(at.batch, at.head, at.time(s));
      for (std::int64_t k = 0; k < (kPerKey ? n.keys : 1); ++k) {
        for (int part = 0; part < kParts; ++part) {
          row[k * kParts + part] = da[part][s * n.transition() + k];
        }
      }
    }
  }

  /// (K, V) of a unit in a state of the caller's; zeros where that is null.
  void LoadState(ConstState state, std::int64_t unit, std::array<T*, 2> to) const {
    const T* const from = static_cast<const T*>(state);
    for (std::int64_t k = 0; k < n.keys; ++k) {
      const T* const row = from + (unit * n.keys + k) * n.values * kParts;
      for (int part = 0; part < kParts; ++part) {
        T* const tile = to[part] + k * n.value_stride;
        std::fill_n(tile, whole_tiles(n.values), T(0));
        if (state == nullptr) continue;
        for (std::int64_t v = 0; v < n.values; ++v) tile[v] = row[v * kParts + part];
      }
    }
  }
  void StoreState(std::array<T*, 2> from, std::int64_t unit, State state) const {
    if (state == nullptr) return;
    for (std::int64_t k = 0; k < n.keys; ++k) {
      T* const row = static_cast<T*>(state) + (unit * n.keys + k) * n.values * kParts;
      for (int part = 0; part < kParts; ++part) {
        const T* const tile = from[part] + k * n.value_stride;
        for (std::int64_t v = 0; v < n.values; ++v) row[v * kParts + part] = tile[v];
      }
    }
  }
  void LoadSaved(const void* saved, const Place& at, T* const* to) const {
    const T* from = Saved(static_cast<const T*>(saved), at);
    for (int part = 0; part < kParts; ++part) {
      for (std::int64_t k = 0; k < n.keys; ++k, from += n.values) {
        T* const row = to[part] + k * n.value_stride;
        std::copy_n(from, n.values, row);
        std::fill(row + n.values, row + whole_tiles(n.values), T(0));
      }
    }
  }
  void StoreSaved(T* const* from, const Place& at, void* saved) const {
    T* to = Saved(static_cast<T*>(saved), at);
    for (int part = 0; part < kParts; ++part) {
      for (std::int64_t k = 0; k < n.keys; ++k, to += n.values) {
        std::copy_n(from[part] + k * n.value_stride, n.values, to);
      }
    }
  }
  /// Where the saved state before a chunk lies.
  template <class Numbers>
  Numbers* Saved(Numbers* saved, const Place& at) const {
    const std::int64_t index = at.saved * heads_ + at.head;
    return saved + index * kParts * n.keys * n.values;
  }

  void AdvanceKey(std::int64_t key, std::array<T, 2> factor, T* const* from, T* const* add,
                  T* const* to) const {
    const std::int64_t at = key * n.value_stride;
    AdvanceRow<T, kParts>(factor, {from[0] + at, from[1] + at}, {add[0] + at, add[1] + at},
                          {to[0] + at, to[1] + at}, whole_tiles(n.values));
  }
  void Copy(std::array<T*, 2> from, T* const* to) const {
    for (int part = 0; part < kParts; ++part) std::copy_n(from[part], n.state(), to[part]);
  }

  TileSizes n;
  std::int64_t heads_;
  bool reverse_;
  Sequences sequences_;
  DType dtype_;
  FeatureMap feature_map_;
  HeadRows a_;
};

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_MEMORY_INL_H_
