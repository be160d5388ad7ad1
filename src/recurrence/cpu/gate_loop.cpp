// GateLoop for heads wider than one channel, and its adjoint: chunks of time as matrix products.
#include <algorithm>
#include <array>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/features.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/gate_loop.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/gate_loop_chunk-inl.h"

#ifndef GATELOOP_RECURRENCE_CPU_GATE_LOOP_ONCE_
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_ONCE_
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

/// The state before each chunk and after the last one, planes of (keys, values) tiles, and the
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

    std::int64_t time(std::int64_t s) const { return first + s * direction; }
  };
  Place PlaceOf(std::int64_t unit, std::int64_t chunk) const {
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
            .begins = chunk == 0};
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

template <class T_, int kParts, bool kPerKey>
class GateLoopForward : public Chunks<T_, kParts, kPerKey> {
  using Base = Chunks<T_, kParts, kPerKey>;
  using Base::n;
  using typename Base::Place;

 public:
  using typename Base::T;
  using Tiles = ForwardTiles<T>;

  explicit GateLoopForward(const GateLoop& p)
      : Base(p),
        p_(p),
        q_(p.q, storage_bytes(p.dtype)),
        k_(p.k, storage_bytes(p.dtype)),
        v_(p.v, storage_bytes(p.dtype)),
        y_(p.y, storage_bytes(p.dtype)) {}

  /// A unit from its first step to its last.
  void Whole(std::int64_t unit, const Tiles& t) const {
    Base::LoadState(p_.initial_state, unit, {t.state[0], t.state[1]});
    for (std::int64_t i = 0; i < Base::ChunksOf(unit); ++i) {
      const Place at = Base::PlaceOf(unit, i);
      const ChunkForward<T, kParts, kPerKey> chunk(n, t, at.steps);
      LoadSources(at, t);
      Read(at, t);
      chunk.Sum();
      for (std::int64_t key = 0; key < n.keys; ++key) {
        Base::AdvanceKey(key, chunk.Last(key), t.state, t.sum, t.state);
      }
    }
    Base::StoreState({t.state[0], t.state[1]}, unit, p_.final_state);
  }

  // In parts. A chunk's own state is put where the state after it belongs.
  void Sum(std::int64_t unit, std::int64_t i, const Tiles& t, const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i);
    const ChunkForward<T, kParts, kPerKey> chunk(n, t, at.steps);
    LoadSources(at, t);
    chunk.Sum();
    Base::Copy({t.sum[0], t.sum[1]}, states.state(unit, i + 1).data());
    for (std::int64_t k = 0; k < n.keys; ++k) states.product(unit, i, k) = chunk.Last(k);
  }
  void Begin(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::LoadState(p_.initial_state, unit, states.state(unit, 0));
  }
  void Advance(std::int64_t unit, std::int64_t key, const ChunkStates<T>& states) const {
    for (std::int64_t i = 0; i < Base::ChunksOf(unit); ++i) {
      const auto before = states.state(unit, i), after = states.state(unit, i + 1);
      Base::AdvanceKey(key, states.product(unit, i, key), before.data(), after.data(),
                       after.data());
    }
  }
  void End(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::StoreState(states.state(unit, Base::ChunksOf(unit)), unit, p_.final_state);
  }
  void Finish(std::int64_t unit, std::int64_t i, const Tiles& t,
              const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i);
    LoadSources(at, t);
    Base::Copy(states.state(unit, i), t.state);
    Read(at, t);
  }

 private:
  void LoadSources(const Place& at, const Tiles& t) const {
    Base::LoadKeys(k_, at, t.k);
    Base::Load(v_, at, n.values, t.v, n.value_stride);
    Base::LoadTransitions(at, t.a);
    ChunkForward<T, kParts, kPerKey>(n, t, at.steps).Decays();
  }

  /// The output of a chunk whose sources and state are loaded.
  void Read(const Place& at, const Tiles& t) const {
    Base::LoadKeys(q_, at, t.q);
    const bool has_state = !at.begins || p_.initial_state != nullptr;
    ChunkForward<T, kParts, kPerKey>(n, t, at.steps).Output(has_state);
    Base::Store(t.y, n.value_stride, at, n.values, y_);
    if (p_.saved_states == nullptr) return;
    T* to = Base::Saved(static_cast<T*>(p_.saved_states), at);
    for (int part = 0; part < kParts; ++part) {
      for (std::int64_t k = 0; k < n.keys; ++k, to += n.values) {
        std::copy_n(t.state[part] + k * n.value_stride, n.values, to);
      }
    }
  }

  const GateLoop& p_;
  HeadRows q_, k_, v_, y_;
};

template <class T_, int kParts, bool kPerKey>
class GateLoopAdjoint : public Chunks<T_, kParts, kPerKey> {
  using Base = Chunks<T_, kParts, kPerKey>;
  using Base::n;
  using typename Base::Place;

 public:
  using typename Base::T;
  using Tiles = BackwardTiles<T>;

  explicit GateLoopAdjoint(const GateLoopBackward& p)
      : Base(p),
        p_(p),
        q_(p.q, storage_bytes(p.dtype)),
        k_(p.k, storage_bytes(p.dtype)),
        v_(p.v, storage_bytes(p.dtype)),
        dy_(p.dy, storage_bytes(p.dtype)),
        dq_(p.dq, storage_bytes(p.dtype)),
        dk_(p.dk, storage_bytes(p.dtype)),
        dv_(p.dv, storage_bytes(p.dtype)),
        da_(p.da, kParts * sizeof(T)) {}

  void Whole(std::int64_t unit, const Tiles& t) const {
    Base::LoadState(p_.dfinal_state, unit, {t.carry[0], t.carry[1]});
    for (std::int64_t i = Base::ChunksOf(unit) - 1; i >= 0; --i) {
      const Place at = Base::PlaceOf(unit, i);
      LoadReads(at, t);
      WriteGradients(at, t);
      const ChunkBackward<T, kParts, kPerKey> chunk(n, t, at.steps);
      chunk.Sum();
      for (std::int64_t key = 0; key < n.keys; ++key) {
        Base::AdvanceKey(key, Conjugate(chunk.Last(key)), t.carry, t.sum, t.carry);
      }
    }
    Base::StoreState({t.carry[0], t.carry[1]}, unit, p_.dinitial_state);
  }

  // In parts. states(i) becomes the gradient of the state before chunk i.
  void Sum(std::int64_t unit, std::int64_t i, const Tiles& t, const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i);
    const ChunkBackward<T, kParts, kPerKey> chunk(n, t, at.steps);
    LoadReads(at, t);
    chunk.Sum();
    Base::Copy({t.sum[0], t.sum[1]}, states.state(unit, i).data());
    for (std::int64_t k = 0; k < n.keys; ++k) {
      states.product(unit, i, k) = Conjugate(chunk.Last(k));
    }
  }
  void Begin(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::LoadState(p_.dfinal_state, unit, states.state(unit, Base::ChunksOf(unit)));
  }
  void Advance(std::int64_t unit, std::int64_t key, const ChunkStates<T>& states) const {
    for (std::int64_t i = Base::ChunksOf(unit) - 1; i >= 0; --i) {
      const auto before = states.state(unit, i), after = states.state(unit, i + 1);
      Base::AdvanceKey(key, states.product(unit, i, key), after.data(), before.data(),
                       before.data());
    }
  }
  void End(std::int64_t unit, const ChunkStates<T>& states) const {
    Base::StoreState(states.state(unit, 0), unit, p_.dinitial_state);
  }
  void Finish(std::int64_t unit, std::int64_t i, const Tiles& t,
              const ChunkStates<T>& states) const {
    const Place at = Base::PlaceOf(unit, i);
    LoadReads(at, t);
    Base::Copy(states.state(unit, i + 1), t.carry);
    WriteGradients(at, t);
  }

 private:
  static std::array<T, 2> Conjugate(std::array<T, 2> a) { return {a[0], -a[1]}; }

  void LoadReads(const Place& at, const Tiles& t) const {
    Base::LoadKeys(q_, at, t.q);
    Base::Load(dy_, at, n.values, t.dy, n.value_stride);
    Base::LoadTransitions(at, t.a);
    ChunkBackward<T, kParts, kPerKey>(n, t, at.steps).Decays();
  }

  /// The gradients of a chunk whose reads and carry are loaded.
  void WriteGradients(const Place& at, const Tiles& t) const {
    Base::LoadKeys(k_, at, t.k);
    Base::Load(v_, at, n.values, t.v, n.value_stride);
    const T* from = Base::Saved(static_cast<const T*>(p_.saved_states), at);
    for (int part = 0; part < kParts; ++part) {
      for (std::int64_t k = 0; k < n.keys; ++k, from += n.values) {
        T* const row = t.state[part] + k * n.value_stride;
        std::copy_n(from, n.values, row);
        std::fill(row + n.values, row + whole_tiles(n.values), T(0));
      }
    }
    ChunkBackward<T, kParts, kPerKey>(n, t, at.steps).Gradients();
    Base::StoreKeys(t.q, t.dq, at, dq_);
    Base::StoreKeys(t.k, t.dk, at, dk_);
    Base::Store(t.dv, n.value_stride, at, n.values, dv_);
    for (std::int64_t s = 0; s < at.steps; ++s) {
      T* const to = da_.template At<T>(at.batch, at.head, at.time(s));
      for (std::int64_t k = 0; k < (kPerKey ? n.keys : 1); ++k) {
        for (int part = 0; part < kParts; ++part) {
          to[k * kParts + part] = t.da[part][s * n.transition() + k];
        }
      }
    }
  }

  const GateLoopBackward& p_;
  HeadRows q_, k_, v_, dy_, dq_, dk_, dv_, da_;
};

template <class Op>
void RunChunks(const Op& op, const TileSizes& n, const ChunkPlan& plan, const Executor& executor,
               void* scratch) {
  TileMemory memory(scratch);
  const ChunkStates<typename Op::T> states(n, plan, memory);
  TileMemory none(nullptr);
  const typename Op::Tiles counted(n, none);
  const auto tiles = [&](std::int64_t slot) {
    TileMemory own(static_cast<std::byte*>(scratch) + memory.taken() +
                   static_cast<std::size_t>(slot) * none.taken());
    return typename Op::Tiles(n, own);
  };
  if (!plan.cut) {
    return parallel(executor, plan.slots, plan.units,
                    [&](std::int64_t unit, std::int64_t slot) { op.Whole(unit, tiles(slot)); });
  }
  const auto for_each_chunk = [&](const auto& work) {
    parallel(executor, plan.slots, plan.units * plan.chunks,
             [&](std::int64_t i, std::int64_t slot) {
               const std::int64_t unit = i / plan.chunks, chunk = i % plan.chunks;
               if (chunk < op.ChunksOf(unit)) work(unit, chunk, tiles(slot));
             });
  };
  for_each_chunk([&](std::int64_t unit, std::int64_t chunk, const auto& t) {
    op.Sum(unit, chunk, t, states);
  });
  for (std::int64_t unit = 0; unit < plan.units; ++unit) op.Begin(unit, states);
  parallel(executor, plan.slots, plan.units * n.keys,
           [&](std::int64_t i, std::int64_t) { op.Advance(i / n.keys, i % n.keys, states); });
  for (std::int64_t unit = 0; unit < plan.units; ++unit) op.End(unit, states);
  for_each_chunk([&](std::int64_t unit, std::int64_t chunk, const auto& t) {
    op.Finish(unit, chunk, t, states);
  });
}

template <template <class, int, bool> class Op, class Params>
void RunAnyChunks(const Params& p, const Executor& executor, void* scratch) {
  const TileSizes n(p);
  const ChunkPlan plan(p, executor.threads);
  const auto run_in = [&]<class T>() {
    const auto run = [&](const auto& op) { RunChunks(op, n, plan, executor, scratch); };
    if (p.complex) return p.per_key ? run(Op<T, 2, true>(p)) : run(Op<T, 2, false>(p));
    p.per_key ? run(Op<T, 1, true>(p)) : run(Op<T, 1, false>(p));
  };
  if (p.dtype == DType::kFloat64) return run_in.template operator()<double>();
  run_in.template operator()<float>();
}

void RunGateLoop(const GateLoop& p, const Executor& executor, void* scratch) {
  RunAnyChunks<GateLoopForward>(p, executor, scratch);
}
void RunGateLoopBackward(const GateLoopBackward& p, const Executor& executor, void* scratch) {
  RunAnyChunks<GateLoopAdjoint>(p, executor, scratch);
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunGateLoop);
HWY_EXPORT(RunGateLoopBackward);
namespace {

template <template <class> class Tiles, class T, class Params>
std::size_t chunk_bytes_of(const Params& p, int threads) {
  const TileSizes n(p);
  const ChunkPlan plan(p, threads);
  TileMemory shared(nullptr), own(nullptr);
  const ChunkStates<T> states(n, plan, shared);
  const Tiles<T> tiles(n, own);
  return shared.taken() + static_cast<std::size_t>(plan.slots) * own.taken();
}

template <template <class> class Tiles, class Params>
std::size_t chunk_bytes(const Params& p, int threads) {
  return p.dtype == DType::kFloat64 ? chunk_bytes_of<Tiles, double>(p, threads)
                                    : chunk_bytes_of<Tiles, float>(p, threads);
}

template <class Params>
void check_heads(const char* op, const Params& p) {
  check(op, {p.shape.batch, p.shape.time, p.shape.heads}, p.dtype, /*complex_allowed=*/false);
  check(op, Shape{p.shape.batch, p.shape.time, p.shape.heads}, p.offsets);
  if (p.shape.keys < 0 || p.shape.values < 0) {
    throw std::invalid_argument(
        std::string(op) + ": keys and values must be non-negative, got keys " +
        std::to_string(p.shape.keys) + " and values " + std::to_string(p.shape.values));
  }
  if (p.per_key && p.feature_map != FeatureMap::kNone)
    throw std::invalid_argument(std::string(op) + ": per_key must be false with a feature map");
}

}  // namespace
}  // namespace cpu

std::size_t scratch_bytes(const GateLoop& p, int threads) {
  return cpu::chunk_bytes<cpu::ForwardTiles>(p, threads);
}
std::size_t scratch_bytes(const GateLoopBackward& p, int threads) {
  return cpu::chunk_bytes<cpu::BackwardTiles>(p, threads);
}
void run(const GateLoop& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check_heads("GateLoop", p);
  HWY_DYNAMIC_DISPATCH(RunGateLoop)(p, executor, scratch);
}
void run(const GateLoopBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check_heads("GateLoopBackward", p);
  HWY_DYNAMIC_DISPATCH(RunGateLoopBackward)(p, executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
