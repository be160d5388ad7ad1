// How GateLoop step by step lays heads in vectors: one in several, or several in one.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "recurrence/cpu/gate_loop_memory-inl.h"
#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/rows-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_HEADS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_HEADS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_HEADS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_HEADS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// The vectors of a step, and sums across their lanes.
template <class T>
struct StepVectors {
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  static constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(D()));
  /// Keys of a block: all lanes or half of them, as sums of rows need, and few for the registers.
  static constexpr int kBlockKeys =
      static_cast<int>(std::min<std::int64_t>(kLanes, kLanes < 16 ? 4 : kStepBlockKeys));

#if HWY_TARGET != HWY_SCALAR
  /// Of kRows rows: lane i of each kRows lanes is the sum of those lanes of rows[i]. Overwrites
  /// rows.
  template <int kRows>
  static HWY_INLINE V SumsOfRows(V* rows) {
    for (int i = 0; i < kRows; i += 2) rows[i / 2] = SumOfNeighbours<1>(rows[i], rows[i + 1]);
    if constexpr (kRows >= 4) {
      for (int i = 0; i < kRows / 2; i += 2) {
        rows[i / 2] = SumOfNeighbours<2>(rows[i], rows[i + 1]);
      }
    }
    if constexpr (kRows >= 8) rows[0] = SumOfNeighbours<4>(rows[0], rows[1]);
    return rows[0];
  }

  /// Every lane is the sum of its group of kGroup lanes.
  template <int kGroup>
  static HWY_INLINE V SumWithin(V x) {
    x = hn::Add(x, Swapped<1>(x));
    if constexpr (kGroup >= 4) x = hn::Add(x, Swapped<2>(x));
    if constexpr (kGroup >= 8) x = hn::Add(x, Swapped<4>(x));
    return x;
  }

 private:
  // Of groups of kGroup lanes.

  /// Each in the place of its neighbour.
  template <int kGroup>
  static HWY_INLINE V Swapped(V x) {
    static_assert(kGroup * sizeof(T) <= 16);
    if constexpr (kGroup * sizeof(T) == 4) return hn::Shuffle2301(x);
    if constexpr (kGroup * sizeof(T) == 8) {
      const hn::Repartition<double, D> pairs;
      return hn::BitCast(D(), hn::Shuffle01(hn::BitCast(pairs, x)));
    }
    if constexpr (kGroup * sizeof(T) == 16) return hn::SwapAdjacentBlocks(x);
  }
  /// The odd ones of `odd` between the even ones of `even`.
  template <int kGroup>
  static HWY_INLINE V InTurns(V odd, V even) {
    static_assert(kGroup * sizeof(T) <= 16);
    if constexpr (kGroup * sizeof(T) == 4) return hn::OddEven(odd, even);
    if constexpr (kGroup * sizeof(T) == 8) {
      const hn::Repartition<double, D> pairs;
      return hn::BitCast(D(), hn::OddEven(hn::BitCast(pairs, odd), hn::BitCast(pairs, even)));
    }
    if constexpr (kGroup * sizeof(T) == 16) return hn::OddEvenBlocks(odd, even);
  }
  /// Each two added up: those of `even` and of `odd` in turns.
  template <int kGroup>
  static HWY_INLINE V SumOfNeighbours(V even, V odd) {
    return hn::Add(InTurns<kGroup>(odd, even),
                   InTurns<kGroup>(Swapped<kGroup>(odd), Swapped<kGroup>(even)));
  }
#endif
};

/// A head of any width, in blocks of kBlockKeys keys and a vector of values. A unit is a head of a
/// sequence. Rows and states are padded with zeros to whole blocks.
template <class T_, int kParts_, bool kPerKey_>
class OneHead : public Chunks<T_, kParts_, kPerKey_> {
  using Base = Chunks<T_, kParts_, kPerKey_>;
  using Vectors = StepVectors<T_>;

 public:
  using T = T_;
  using D = typename Vectors::D;
  using V = typename Vectors::V;
  static constexpr int kParts = kParts_, kKeys = Vectors::kBlockKeys;
  static constexpr bool kPerKey = kPerKey_, kIsOneBlock = false;

  using Base::Base;
  std::int64_t Units() const { return this->sequences_.count() * this->heads_; }

 protected:
  using Base::n;
  using typename Base::Place;

  std::int64_t KeyStride() const { return n.key_stride; }
  std::int64_t ValueStride() const { return n.value_stride; }
  /// f(key, value): the first ones of each block.
  template <class F>
  void ForEachBlock(const F& f) const {
    for (std::int64_t value = 0; value < n.values; value += Vectors::kLanes) {
      for (std::int64_t key = 0; key < n.keys; key += kKeys) f(key, value);
    }
  }

  HWY_INLINE V OfKey(const T* row, int key) const { return hn::Set(D(), row[key]); }
  /// The transition of step s, of a key where each has its own.
  HWY_INLINE V TransitionOf(const T* a, std::int64_t s, std::int64_t key) const {
    return hn::Set(D(), a[s * n.transition() + (kPerKey ? key : 0)]);
  }
  /// Adds the sum of rows[i] to to[i]. Overwrites rows.
  HWY_INLINE void PutSums(V* rows, T* to) const {
#if HWY_TARGET == HWY_SCALAR
    *to += hn::GetLane(rows[0]);
#else
    const V sums = Vectors::template SumsOfRows<kKeys>(rows);
    if constexpr (kKeys == Vectors::kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(D(), to), sums), D(), to);
    } else {
      static_assert(2 * kKeys == Vectors::kLanes);
      const hn::Half<D> half;
      const auto sum = hn::Add(hn::LowerHalf(half, sums), hn::UpperHalf(half, sums));
      hn::StoreU(hn::Add(hn::LoadU(half, to), sum), half, to);
    }
#endif
  }
  /// The gradient of one step's transition from its sums by lanes.
  HWY_INLINE void PutTransition(V sums, std::int64_t s, T* da) const {
    da[s * n.transition()] = hn::GetLane(hn::SumOfLanes(D(), sums));
  }

  void LoadValues(const HeadRows& from, const Place& at, T* tile) const {
    Base::Load(from, at, n.values, tile, n.value_stride);
  }
  void StoreValues(const T* tile, const Place& at, const HeadRows& to) const {
    Base::Store(tile, n.value_stride, at, n.values, to);
  }
  void LoadState(ConstState state, std::int64_t unit, T* const* to) const {
    Base::LoadState(state, unit, {to[0], to[1]});
    PadKeys(to);
  }
  void StoreState(T* const* from, std::int64_t unit, State state) const {
    Base::StoreState({from[0], from[1]}, unit, state);
  }
  void LoadSaved(const void* saved, const Place& at, T* const* to) const {
    Base::LoadSaved(saved, at, to);
    PadKeys(to);
  }

 private:
  void PadKeys(T* const* state) const {
    for (int part = 0; part < kParts; ++part) {
      std::fill(state[part] + n.keys * n.value_stride,
                state[part] + whole_tiles(n.keys) * n.value_stride, T(0));
    }
  }
};

#if HWY_TARGET != HWY_SCALAR  // its vectors hold no two heads

/// Widen, and zeros up to whole vectors.
template <class S>
void WidenPadded(const S* from, std::int64_t n, Accumulation<S>* to) {
  using T = Accumulation<S>;
  const hn::ScalableTag<T> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  const std::int64_t whole = n / kLanes * kLanes;
  for (std::int64_t c = 0; c < whole; c += kLanes) hn::StoreU(LoadReal(d, from + c), d, to + c);
  if (whole == n) return;
  // A masked load is one instruction where a load and a fill are a dozen.
  if constexpr (std::is_same_v<S, T> && !HWY_MEM_OPS_MIGHT_FAULT) {
    const auto mask = hn::FirstN(d, static_cast<std::size_t>(n - whole));
    hn::StoreU(hn::MaskedLoad(mask, d, from + whole), d, to + whole);
  } else {
    hn::StoreU(hn::Zero(d), d, to + whole);
    Widen(from + whole, n - whole, to + whole);
  }
}

/// The first n of the numbers in whole vectors, narrowed.
template <class S>
void NarrowPadded(const Accumulation<S>* from, std::int64_t n, S* to) {
  using T = Accumulation<S>;
  const hn::ScalableTag<T> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  const std::int64_t whole = n / kLanes * kLanes;
  for (std::int64_t c = 0; c < whole; c += kLanes)
    StoreReal(d, hn::LoadU(d, from + c), to + c, /*stream=*/false);
  if (whole == n) return;
  if constexpr (std::is_same_v<S, T> && !HWY_MEM_OPS_MIGHT_FAULT) {
    const auto mask = hn::FirstN(d, static_cast<std::size_t>(n - whole));
    hn::BlendedStore(hn::MaskedLoad(mask, d, from + whole), mask, d, to + whole);
  } else {
    ForEachVector<T>(n - whole, [&](auto part, std::int64_t c) HWY_ATTR {
      StoreReal(part, hn::LoadU(part, from + whole + c), to + whole + c, /*stream=*/false);
    });
  }
}

/// Heads of kWidth keys and as many values, as many as a vector holds side by side. They are a unit
/// and one block. Tiles have kTileColumns columns, of which a vector is used.
template <class T_, int kParts_, bool kPerKey_, int kWidth>
class SharedHeads : public Chunks<T_, kParts_, kPerKey_> {
  using Base = Chunks<T_, kParts_, kPerKey_>;
  using Vectors = StepVectors<T_>;

 public:
  using T = T_;
  using D = typename Vectors::D;
  using V = typename Vectors::V;
  static constexpr int kParts = kParts_, kKeys = kWidth;
  static constexpr bool kPerKey = kPerKey_, kIsOneBlock = true;
  static constexpr std::int64_t kHeads = Vectors::kLanes / kWidth;

  template <class Params>
  explicit SharedHeads(const Params& p)
      : Base(p),
        groups_((p.shape.heads + kHeads - 1) / kHeads),
        // Lanes beyond the heads are not read; % keeps their indices valid.
        first_of_(Indices([](auto lane) { return lane * kWidth % Vectors::kLanes; })),
        of_head_(Indices([](auto lane) { return lane / kWidth; })) {
    for (int i = 0; i < kWidth; ++i) {
      of_key_[i] = Indices([i](auto lane) { return lane / kWidth * kWidth + i; });
    }
  }

  std::int64_t Units() const { return this->sequences_.count() * groups_; }
  std::int64_t ChunksOf(std::int64_t unit) const { return Base::ChunksOf(FirstHead(unit)); }

 protected:
  using typename Base::Place;

  Place PlaceOf(std::int64_t unit, std::int64_t chunk, std::int64_t next) const {
    return Base::PlaceOf(FirstHead(unit), chunk, next);
  }
  std::int64_t KeyStride() const { return kTileColumns; }
  std::int64_t ValueStride() const { return kTileColumns; }
  template <class F>
  void ForEachBlock(const F& f) const {
    f(std::int64_t{0}, std::int64_t{0});
  }

  HWY_INLINE V OfKey(const T* row, int key) const {
    return hn::TableLookupLanes(hn::LoadU(D(), row), of_key_[key]);
  }
  HWY_INLINE V TransitionOf(const T* a, std::int64_t s, std::int64_t key) const {
    const T* const row = a + s * kTileColumns;
    return kPerKey ? OfKey(row, static_cast<int>(key))
                   : hn::TableLookupLanes(hn::LoadU(D(), row), of_head_);
  }
  HWY_INLINE void PutSums(V* rows, T* to) const {
    hn::StoreU(Vectors::template SumsOfRows<kWidth>(rows), D(), to);
  }
  HWY_INLINE void PutTransition(V sums, std::int64_t s, T* da) const {
    const V sum = Vectors::template SumWithin<kWidth>(sums);
    hn::StoreU(hn::TableLookupLanes(sum, first_of_), D(), da + s * kTileColumns);
  }

  void LoadKeys(const HeadRows& from, const Place& at, T* tile) const {
    LoadValues(from, at, tile);
  }
  void StoreKeys(const T*, const T* tile, const Place& at, const HeadRows& to) const {
    StoreValues(tile, at, to);
  }
  void LoadValues(const HeadRows& from, const Place& at, T* tile) const {
    Base::WithStorage([&]<class S>() {
      if (from.IsNull()) {
        std::fill_n(tile, at.steps * kTileColumns, T(0));
      } else {
        for (std::int64_t s = 0; s < at.steps; ++s) {
          LoadRow<S>(from, at, s, kWidth, tile + s * kTileColumns);
        }
      }
    });
  }
  void StoreValues(const T* tile, const Place& at, const HeadRows& to) const {
    Base::WithStorage([&]<class S>() {
      for (std::int64_t s = 0; s < at.steps; ++s) {
        StoreRow<S>(tile + s * kTileColumns, at, s, kWidth, to);
      }
    });
  }
  void LoadTransitions(const Place& at, T* const* a) const {
    HWY_ALIGN T pairs[2 * Vectors::kLanes] = {};
    for (std::int64_t s = 0; s < at.steps; ++s) {
      const std::int64_t row = s * kTileColumns;
      if constexpr (kParts == 1) {
        LoadRow<T>(this->a_, at, s, kTransitions, a[0] + row);
      } else {
        LoadRow<T>(this->a_, at, s, 2 * kTransitions, pairs);
        StorePlanar(D(), Load<Complex<D>>(D(), pairs, 0), a[0] + row, a[1] - a[0], 0);
      }
    }
  }
  void StoreTransitions(T* const* da, const Place& at, const HeadRows& to) const {
    HWY_ALIGN T pairs[2 * Vectors::kLanes];
    for (std::int64_t s = 0; s < at.steps; ++s) {
      const std::int64_t row = s * kTileColumns;
      if constexpr (kParts == 1) {
        StoreRow<T>(da[0] + row, at, s, kTransitions, to);
      } else {
        Store(D(), LoadPlanar<Complex<D>>(D(), da[0] + row, da[1] - da[0], 0), pairs, 0);
        StoreRow<T>(pairs, at, s, 2 * kTransitions, to);
      }
    }
  }

  /// A unit's part of a state of the caller's, (N, H, K, V); zeros where that is null.
  void LoadState(ConstState state, std::int64_t unit, T* const* to) const {
    Clear(to);
    if (state == nullptr) return;
    const T* const from = static_cast<const T*>(state) + FirstHead(unit) * kSize * kParts;
    ForEachNumber(HeadCount(unit % groups_ * kHeads), [&](auto head, auto part, auto i, auto lane) {
      to[part][lane] = from[(head * kSize + i) * kParts + part];
    });
  }
  void StoreState(T* const* from, std::int64_t unit, State state) const {
    if (state == nullptr) return;
    T* const to = static_cast<T*>(state) + FirstHead(unit) * kSize * kParts;
    ForEachNumber(HeadCount(unit % groups_ * kHeads), [&](auto head, auto part, auto i, auto lane) {
      to[(head * kSize + i) * kParts + part] = from[part][lane];
    });
  }
  void LoadSaved(const void* saved, const Place& at, T* const* to) const {
    Clear(to);
    const T* const from = Base::Saved(static_cast<const T*>(saved), at);
    ForEachNumber(HeadCount(at.head), [&](auto head, auto part, auto i, auto lane) {
      to[part][lane] = from[(head * kParts + part) * kSize + i];
    });
  }
  void StoreSaved(T* const* from, const Place& at, void* saved) const {
    T* const to = Base::Saved(static_cast<T*>(saved), at);
    ForEachNumber(HeadCount(at.head), [&](auto head, auto part, auto i, auto lane) {
      to[(head * kParts + part) * kSize + i] = from[part][lane];
    });
  }

 private:
  static constexpr std::int64_t kSize = std::int64_t{kWidth} * kWidth;  // of a head's state
  static constexpr std::int64_t kTransitions = kPerKey ? kWidth : 1;    // of a head
  using TableIndices =
      decltype(hn::SetTableIndices(D(), std::declval<const hwy::MakeSigned<T>*>()));

  /// lane i <- lane from(i).
  template <class From>
  static TableIndices Indices(const From& from) {
    HWY_ALIGN hwy::MakeSigned<T> lanes[Vectors::kLanes];
    for (std::int64_t i = 0; i < Vectors::kLanes; ++i) {
      lanes[i] = static_cast<hwy::MakeSigned<T>>(from(i));
    }
    return hn::SetTableIndices(D(), lanes);
  }
  /// Of the heads of all sequences, the first of the unit.
  std::int64_t FirstHead(std::int64_t unit) const {
    return unit / groups_ * this->heads_ + unit % groups_ * kHeads;
  }
  std::int64_t HeadCount(std::int64_t first) const {
    return std::min(kHeads, this->heads_ - first);
  }

  static void Clear(T* const* state) {
    for (int part = 0; part < kParts; ++part) std::fill_n(state[part], kWidth * kTileColumns, T(0));
  }
  /// f(head, part, i, lane) for number i of a head's state, at `lane` in the planes of a part.
  template <class F>
  static void ForEachNumber(std::int64_t heads, const F& f) {
    for (std::int64_t head = 0; head < heads; ++head) {
      for (int part = 0; part < kParts; ++part) {
        for (std::int64_t i = 0; i < kSize; ++i) {
          f(head, part, i, i / kWidth * kTileColumns + head * kWidth + i % kWidth);
        }
      }
    }
  }

  /// A step's numbers, `width` a head, side by side; zeros up to a vector.
  template <class S>
  void LoadRow(const HeadRows& from, const Place& at, std::int64_t s, std::int64_t width,
               T* row) const {
    const std::int64_t heads = HeadCount(at.head);
    if (heads == 1 || AreSideBySide<S>(from, width)) {
      Base::template PrefetchNext<S>(from, at, s, heads * width);
      WidenPadded(from.template At<const S>(at.batch, at.head, at.time(s)), heads * width, row);
    } else {
      std::fill_n(row, Vectors::kLanes, T(0));
      for (std::int64_t h = 0; h < heads; ++h) {
        Widen(from.template At<const S>(at.batch, at.head + h, at.time(s)), width, row + h * width);
      }
    }
  }
  template <class S>
  void StoreRow(const T* row, const Place& at, std::int64_t s, std::int64_t width,
                const HeadRows& to) const {
    const std::int64_t heads = HeadCount(at.head);
    const bool is_one_row = heads == 1 || AreSideBySide<S>(to, width);
    for (std::int64_t h = 0; h < (is_one_row ? 1 : heads); ++h) {
      NarrowPadded(row + h * width, is_one_row ? heads * width : width,
                   to.template At<S>(at.batch, at.head + h, at.time(s)));
    }
  }
  /// Whether rows of `width` numbers follow one another from head to head.
  template <class S>
  static bool AreSideBySide(const HeadRows& rows, std::int64_t width) {
    return rows.template At<S>(0, 1, 0) - rows.template At<S>(0, 0, 0) == width;
  }

  std::int64_t groups_;
  TableIndices of_key_[kWidth];  // lane <- key i of the lane's head
  TableIndices first_of_;        // lane h <- the first lane of head h
  TableIndices of_head_;         // lane <- the number of the lane's head
};

#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_HEADS_INL_H_
