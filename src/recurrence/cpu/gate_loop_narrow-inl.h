// GateLoop of heads of 2, 4 or 8 channels, step by step: a vector holds heads whole.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "recurrence/cpu/gate_loop_memory-inl.h"
#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/cpu/rows-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_NARROW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_NARROW_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_NARROW_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_NARROW_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR
template <template <class, int, int> class Op, class T, class Params>
bool RunNarrow(const Params&, int, const Executor&, void*) {
  return false;  // a vector holds no head
}
template <class, int, int>
class NarrowForward;
template <class, int, int>
class NarrowBackward;
#else

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

/// Vectors whose lanes are heads of kWidth channels one after the other.
template <class T, int kWidth>
struct NarrowLanes {
  using D = hn::ScalableTag<T>;
  using V = hn::Vec<D>;
  using Index = hwy::MakeSigned<T>;
  static constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(D()));
  static constexpr std::int64_t kHeads = kLanes / kWidth;

  /// lane (head, j) <- lane from(head, j).
  template <class From>
  static auto Indices(const From& from) {
    HWY_ALIGN Index lanes[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i)
      lanes[i] = static_cast<Index>(from(i / kWidth, i % kWidth));
    return hn::SetTableIndices(D(), lanes);
  }

  /// Lane (head, i) of the result is the sum over j of lane (head, j) of rows[i]. Overwrites rows.
  static HWY_INLINE V SumAcross(V* rows) {
    for (int i = 0; i < kWidth; i += 2) rows[i / 2] = SumOfNeighbours<1>(rows[i], rows[i + 1]);
    if constexpr (kWidth >= 4) {
      for (int i = 0; i < kWidth / 2; i += 2) {
        rows[i / 2] = SumOfNeighbours<2>(rows[i], rows[i + 1]);
      }
    }
    if constexpr (kWidth >= 8) rows[0] = SumOfNeighbours<4>(rows[0], rows[1]);
    return rows[0];
  }

  /// Every lane of a head is the sum of the head's lanes.
  static HWY_INLINE V SumWithin(V x) {
    x = hn::Add(x, Swapped<1>(x));
    if constexpr (kWidth >= 4) x = hn::Add(x, Swapped<2>(x));
    if constexpr (kWidth >= 8) x = hn::Add(x, Swapped<4>(x));
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
};

/// What both directions share. A unit is as many heads of a sequence as a vector holds.
template <class T_, int kParts, int kWidth>
class NarrowHeads : public Chunks<T_, kParts, false> {
  using Base = Chunks<T_, kParts, false>;

 public:
  using T = T_;
  using Lanes = NarrowLanes<T, kWidth>;
  using D = typename Lanes::D;
  using V = typename Lanes::V;
  static constexpr std::int64_t kHeads = Lanes::kHeads;

  template <class Params>
  explicit NarrowHeads(const Params& p) : Base(p), groups_((p.shape.heads + kHeads - 1) / kHeads) {
    for (int i = 0; i < kWidth; ++i) {
      of_key_[i] = Lanes::Indices([i](auto head, auto) { return head * kWidth + i; });
    }
    real_ = Lanes::Indices([](auto head, auto) { return head * kParts; });
    imaginary_ = Lanes::Indices([](auto head, auto) { return head * kParts + kParts - 1; });
  }

  std::int64_t Units() const { return this->sequences_.count() * groups_; }

 protected:
  using typename Base::Place;
  using Indices = decltype(Lanes::Indices([](auto, auto) { return 0; }));

  struct State {
    V parts[kParts][kWidth];  // a vector for every key
  };
  struct Transition {
    V re, im;  // equal in all lanes of a head
  };

  Place PlaceOf(std::int64_t unit, std::int64_t chunk) const {
    return Base::PlaceOf(FirstRow(unit), chunk);
  }
  std::int64_t ChunksOf(std::int64_t unit) const { return Base::ChunksOf(FirstRow(unit)); }
  std::int64_t FirstHead(std::int64_t unit) const { return unit % groups_ * kHeads; }
  /// Of the heads of all sequences, the first of the unit.
  std::int64_t FirstRow(std::int64_t unit) const {
    return unit / groups_ * this->heads_ + FirstHead(unit);
  }
  std::int64_t HeadCount(std::int64_t unit) const {
    return std::min(kHeads, this->heads_ - FirstHead(unit));
  }

  /// Rows of `width` numbers a head -> (steps, heads side by side), zeros up to a vector.
  void LoadRows(const HeadRows& from, const Place& at, std::int64_t heads, T* tile) const {
    Base::WithStorage([&]<class S>() { LoadRowsOf<S>(from, at, heads, kWidth, tile); });
  }
  template <class S>
  void LoadRowsOf(const HeadRows& from, const Place& at, std::int64_t heads, std::int64_t width,
                  T* tile) const {
    if (from.IsNull()) {
      std::fill_n(tile, at.steps * kTileColumns, T(0));
      return;
    }
    const bool is_one_row = heads == 1 || AreSideBySide<S>(from, width);
    for (std::int64_t s = 0; s < at.steps; ++s, tile += kTileColumns) {
      if (is_one_row) {
        WidenPadded(from.template At<const S>(at.batch, at.head, at.time(s)), heads * width, tile);
      } else {
        std::fill_n(tile, Lanes::kLanes, T(0));
        for (std::int64_t h = 0; h < heads; ++h) {
          Widen(from.template At<const S>(at.batch, at.head + h, at.time(s)), width,
                tile + h * width);
        }
      }
    }
  }
  void StoreRows(const T* tile, const Place& at, std::int64_t heads, const HeadRows& to) const {
    Base::WithStorage([&]<class S>() { StoreRowsOf<S>(tile, at, heads, kWidth, to); });
  }
  template <class S>
  void StoreRowsOf(const T* tile, const Place& at, std::int64_t heads, std::int64_t width,
                   const HeadRows& to) const {
    const bool is_one_row = heads == 1 || AreSideBySide<S>(to, width);
    for (std::int64_t s = 0; s < at.steps; ++s, tile += kTileColumns) {
      for (std::int64_t h = 0; h < (is_one_row ? 1 : heads); ++h) {
        NarrowPadded(tile + h * width, is_one_row ? heads * width : width,
                     to.template At<S>(at.batch, at.head + h, at.time(s)));
      }
    }
  }

  HWY_INLINE V OfKey(V row, int key) const { return hn::TableLookupLanes(row, of_key_[key]); }
  HWY_INLINE Transition TransitionAt(const T* row) const {
    const V packed = hn::LoadU(D(), row);
    return {hn::TableLookupLanes(packed, real_), hn::TableLookupLanes(packed, imaginary_)};
  }

  /// state = a state + k v, of one key.
  HWY_INLINE void Advance(Transition a, V kv, State& state, int key) const {
    if constexpr (kParts == 1) {
      state.parts[0][key] = hn::MulAdd(a.re, state.parts[0][key], kv);
    } else {
      const V re = state.parts[0][key], im = state.parts[1][key];
      state.parts[0][key] = hn::MulAdd(a.re, re, hn::NegMulAdd(a.im, im, kv));
      state.parts[1][key] = hn::MulAdd(a.re, im, hn::Mul(a.im, re));
    }
  }

  /// Between a state and numbers in memory. `row(head, part, key)` is where the values of a key
  /// lie, `stride` numbers apart.
  template <class Row>
  State Gathered(std::int64_t heads, std::int64_t stride, const Row& row) const {
    State state;
    HWY_ALIGN T lanes[Lanes::kLanes];
    for (int part = 0; part < kParts; ++part) {
      for (int k = 0; k < kWidth; ++k) {
        std::fill_n(lanes, Lanes::kLanes, T(0));
        for (std::int64_t h = 0; h < heads; ++h) {
          const T* const from = row(h, part, k);
          for (int v = 0; v < kWidth; ++v) lanes[h * kWidth + v] = from[v * stride];
        }
        state.parts[part][k] = hn::Load(D(), lanes);
      }
    }
    return state;
  }
  template <class Row>
  void Scatter(const State& state, std::int64_t heads, std::int64_t stride, const Row& row) const {
    HWY_ALIGN T lanes[Lanes::kLanes];
    for (int part = 0; part < kParts; ++part) {
      for (int k = 0; k < kWidth; ++k) {
        hn::Store(state.parts[part][k], D(), lanes);
        for (std::int64_t h = 0; h < heads; ++h) {
          T* const to = row(h, part, k);
          for (int v = 0; v < kWidth; ++v) to[v * stride] = lanes[h * kWidth + v];
        }
      }
    }
  }
  /// A unit's part of a state of the caller's, (N, H, K, V); zeros where that is null.
  State LoadState(ConstState state, std::int64_t unit) const {
    if (state == nullptr) return Zeros();
    const T* const from = static_cast<const T*>(state);
    return Gathered(HeadCount(unit), kParts,
                    [&](auto h, auto part, auto k) { return from + InState(unit, h, k) + part; });
  }
  void StoreState(const State& from, std::int64_t unit, ::gateloop::recurrence::State state) const {
    if (state == nullptr) return;
    T* const to = static_cast<T*>(state);
    Scatter(from, HeadCount(unit), kParts,
            [&](auto h, auto part, auto k) { return to + InState(unit, h, k) + part; });
  }
  State LoadSaved(const T* saved, const Place& at, std::int64_t heads) const {
    const T* const from = Base::Saved(saved, at);
    return Gathered(heads, 1,
                    [&](auto h, auto part, auto k) { return from + InSaved(h, part, k); });
  }
  void StoreSaved(const State& state, const Place& at, std::int64_t heads, T* saved) const {
    T* const to = Base::Saved(saved, at);
    Scatter(state, heads, 1, [&](auto h, auto part, auto k) { return to + InSaved(h, part, k); });
  }
  static State Zeros() {
    State state;
    for (auto& part : state.parts) std::fill_n(part, kWidth, hn::Zero(D()));
    return state;
  }

 private:
  /// Whether rows of `width` numbers follow one another from head to head.
  template <class S>
  static bool AreSideBySide(const HeadRows& rows, std::int64_t width) {
    return rows.template At<S>(0, 1, 0) - rows.template At<S>(0, 0, 0) == width;
  }
  static std::int64_t InSaved(std::int64_t head, std::int64_t part, std::int64_t key) {
    return ((head * kParts + part) * kWidth + key) * kWidth;
  }
  std::int64_t InState(std::int64_t unit, std::int64_t head, std::int64_t key) const {
    return ((FirstRow(unit) + head) * kWidth + key) * kWidth * kParts;
  }

  std::int64_t groups_;
  Indices of_key_[kWidth], real_, imaginary_;
};

template <class T, int kParts, int kWidth>
class NarrowForward : public NarrowHeads<T, kParts, kWidth> {
  using Base = NarrowHeads<T, kParts, kWidth>;
  using typename Base::D, typename Base::V, typename Base::Place, typename Base::State;

 public:
  explicit NarrowForward(const GateLoop& p) : Base(p), p_(p), rows_(p) {}

  void Whole(std::int64_t unit, const NarrowTiles<T>& t) const {
    const std::int64_t heads = Base::HeadCount(unit);
    State state = Base::LoadState(p_.initial_state, unit);
    for (std::int64_t i = 0; i < Base::ChunksOf(unit); ++i) {
      const Place at = Base::PlaceOf(unit, i);
      if (p_.saved_states != nullptr) {
        Base::StoreSaved(state, at, heads, static_cast<T*>(p_.saved_states));
      }
      Base::LoadRows(rows_.q, at, heads, t.q);
      Base::LoadRows(rows_.k, at, heads, t.k);
      Base::LoadRows(rows_.v, at, heads, t.v);
      Base::template LoadRowsOf<T>(this->a_, at, heads, kParts, t.a);
      state = Steps(t, at.steps, state);
      Base::StoreRows(t.y, at, heads, rows_.y);
    }
    Base::StoreState(state, unit, p_.final_state);
  }

 private:
  State Steps(const NarrowTiles<T>& t, std::int64_t steps, State state) const {
    const D d;
    for (std::int64_t at = 0; at < steps * kTileColumns; at += kTileColumns) {
      const V q = hn::LoadU(d, t.q + at), k = hn::LoadU(d, t.k + at), v = hn::LoadU(d, t.v + at);
      const auto a = Base::TransitionAt(t.a + at);
      V y = hn::Zero(d);
      for (int key = 0; key < kWidth; ++key) {
        Base::Advance(a, hn::Mul(Base::OfKey(k, key), v), state, key);
        y = hn::MulAdd(Base::OfKey(q, key), state.parts[0][key], y);
      }
      hn::StoreU(y, d, t.y + at);
    }
    return state;
  }

  const GateLoop& p_;
  ForwardRows rows_;
};

template <class T, int kParts, int kWidth>
class NarrowBackward : public NarrowHeads<T, kParts, kWidth> {
  using Base = NarrowHeads<T, kParts, kWidth>;
  using typename Base::D, typename Base::V, typename Base::Place, typename Base::State;
  using typename Base::Lanes;

 public:
  explicit NarrowBackward(const GateLoopBackward& p)
      : Base(p), p_(p), rows_(p, kParts * sizeof(T)), packed_(Lanes::Indices([](auto head, auto j) {
          const auto lane = head * kWidth + j;  // lane / kParts is a head
          return lane < Base::kHeads * kParts ? lane / kParts * kWidth + lane % kParts : 0;
        })) {}

  void Whole(std::int64_t unit, const NarrowTiles<T>& t) const {
    const std::int64_t heads = Base::HeadCount(unit);
    State carry = Base::LoadState(p_.dfinal_state, unit);
    for (std::int64_t i = Base::ChunksOf(unit) - 1; i >= 0; --i) {
      const Place at = Base::PlaceOf(unit, i);
      Base::LoadRows(rows_.q, at, heads, t.q);
      Base::LoadRows(rows_.k, at, heads, t.k);
      Base::LoadRows(rows_.v, at, heads, t.v);
      Base::LoadRows(rows_.dy, at, heads, t.dy);
      Base::template LoadRowsOf<T>(this->a_, at, heads, kParts, t.a);
      const State before = Base::LoadSaved(static_cast<const T*>(p_.saved_states), at, heads);
      Recompute(t, at.steps, before);
      carry = Steps(t, at.steps, carry);
      Base::StoreRows(t.dq, at, heads, rows_.dq);
      Base::StoreRows(t.dk, at, heads, rows_.dk);
      Base::StoreRows(t.dv, at, heads, rows_.dv);
      Base::template StoreRowsOf<T>(t.da, at, heads, kParts, rows_.da);
    }
    Base::StoreState(carry, unit, p_.dinitial_state);
  }

 private:
  static constexpr std::int64_t kStateSize = std::int64_t{kParts} * kWidth * kTileColumns;

  static HWY_INLINE V Stashed(const T* states, int part, int key) {
    return hn::LoadU(D(), states + (part * kWidth + key) * kTileColumns);
  }

  /// The state before each step and after the last.
  void Recompute(const NarrowTiles<T>& t, std::int64_t steps, State state) const {
    const D d;
    for (std::int64_t s = 0;; ++s) {
      T* const to = t.states + s * kStateSize;
      for (int part = 0; part < kParts; ++part) {
        for (int key = 0; key < kWidth; ++key) {
          hn::StoreU(state.parts[part][key], d, to + (part * kWidth + key) * kTileColumns);
        }
      }
      if (s == steps) return;
      const V k = hn::LoadU(d, t.k + s * kTileColumns), v = hn::LoadU(d, t.v + s * kTileColumns);
      const auto a = Base::TransitionAt(t.a + s * kTileColumns);
      for (int key = 0; key < kWidth; ++key) {
        Base::Advance(a, hn::Mul(Base::OfKey(k, key), v), state, key);
      }
    }
  }

  /// `carry`: the gradient of the state after the chunk; returns that of the state before it.
  State Steps(const NarrowTiles<T>& t, std::int64_t steps, State carry) const {
    const D d;
    for (std::int64_t s = steps - 1; s >= 0; --s) {
      const std::int64_t at = s * kTileColumns;
      const V q = hn::LoadU(d, t.q + at), k = hn::LoadU(d, t.k + at);
      const V v = hn::LoadU(d, t.v + at), dy = hn::LoadU(d, t.dy + at);
      const auto a = Base::TransitionAt(t.a + at);
      const T* const before = t.states + s * kStateSize;
      const T* const after = before + kStateSize;
      V dv = hn::Zero(d), da_re = hn::Zero(d), da_im = hn::Zero(d);
      V dq[kWidth], dk[kWidth];
      for (int key = 0; key < kWidth; ++key) {
        const V g_re = hn::MulAdd(Base::OfKey(q, key), dy, carry.parts[0][key]);
        const V h_re = Stashed(before, 0, key);
        dq[key] = hn::Mul(dy, Stashed(after, 0, key));
        dk[key] = hn::Mul(v, g_re);
        dv = hn::MulAdd(Base::OfKey(k, key), g_re, dv);
        da_re = hn::MulAdd(g_re, h_re, da_re);
        if constexpr (kParts == 1) {
          carry.parts[0][key] = hn::Mul(a.re, g_re);
        } else {
          const V g_im = carry.parts[1][key], h_im = Stashed(before, 1, key);
          da_re = hn::MulAdd(g_im, h_im, da_re);
          da_im = hn::MulAdd(g_im, h_re, hn::NegMulAdd(g_re, h_im, da_im));
          carry.parts[0][key] = hn::MulAdd(a.re, g_re, hn::Mul(a.im, g_im));
          carry.parts[1][key] = hn::MulSub(a.re, g_im, hn::Mul(a.im, g_re));
        }
      }
      hn::StoreU(dv, d, t.dv + at);
      hn::StoreU(Lanes::SumAcross(dq), d, t.dq + at);
      hn::StoreU(Lanes::SumAcross(dk), d, t.dk + at);
      V da = Lanes::SumWithin(da_re);
      if constexpr (kParts == 2) da = hn::OddEven(Lanes::SumWithin(da_im), da);
      hn::StoreU(hn::TableLookupLanes(da, packed_), d, t.da + at);
    }
    return carry;
  }

  const GateLoopBackward& p_;
  BackwardRows rows_;
  typename Base::Indices packed_;  // (head, part) side by side
};

/// Whether vectors of this processor hold such heads whole.
template <class T, int kWidth>
constexpr bool HoldsHeads() {
  return NarrowLanes<T, kWidth>::kHeads > 0 && kWidth * sizeof(T) <= 32;
}

/// Runs heads that HoldsHeads(), and returns whether it did. As products of small matrices they
/// take longer, forward and backward: 4 times as long with 8 channels, 7 with 4 and 14 with 2.
/// Threads share sequences and vectors of heads. Time is not cut, so that the bits of a sequence
/// depend on it alone.
template <template <class, int, int> class Op, class T, class Params>
bool RunNarrow(const Params& p, int slots, const Executor& executor, void* scratch) {
  if (!is_narrow(p)) return false;
  const auto run = [&]<int kParts, int kWidth>() {
    if constexpr (!HoldsHeads<T, kWidth>()) {
      return false;
    } else {
      const Op<T, kParts, kWidth> op(p);
      TileMemory counted(nullptr);
      const NarrowTiles<T> none(p, counted);
      parallel(executor, slots, op.Units(), [&](std::int64_t unit, std::int64_t slot) {
        TileMemory own(static_cast<std::byte*>(scratch) +
                       static_cast<std::size_t>(slot) * counted.taken());
        op.Whole(unit, NarrowTiles<T>(p, own));
      });
      return true;
    }
  };
  const auto run_wide = [&]<int kWidth>() {
    return p.complex ? run.template operator()<2, kWidth>() : run.template operator()<1, kWidth>();
  };
  if (p.shape.keys == 2) return run_wide.template operator()<2>();
  if (p.shape.keys == 4) return run_wide.template operator()<4>();
  return run_wide.template operator()<8>();
}

#endif  // HWY_TARGET == HWY_SCALAR

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_NARROW_INL_H_
