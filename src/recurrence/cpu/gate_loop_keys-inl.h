// What is different in a chunk of GateLoop where every key has transitions of its own.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/vectors-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_KEYS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_KEYS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_KEYS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_KEYS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// Real or complex numbers with their parts in planes.
template <class T, int kParts>
struct Planes {
  using D = hn::ScalableTag<T>;
  using V = std::conditional_t<kParts == 1, Real<D>, Complex<D>>;

  static constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));

  static HWY_INLINE V Set(T re, T im) {
    V value = Zeros<V>(D());
    value.re = hn::Set(D(), re);
    if constexpr (kParts == 2) value.im = hn::Set(D(), im);
    return value;
  }
  static HWY_INLINE V Load(T* const* planes, std::int64_t at) {
    V value = Zeros<V>(D());
    value.re = hn::LoadU(D(), planes[0] + at);
    if constexpr (kParts == 2) value.im = hn::LoadU(D(), planes[1] + at);
    return value;
  }
  static HWY_INLINE void Store(V value, T* const* planes, std::int64_t at) {
    hn::StoreU(value.re, D(), planes[0] + at);
    if constexpr (kParts == 2) hn::StoreU(value.im, D(), planes[1] + at);
  }
};

/// A vector of keys at a time goes through all pairs of steps of a chunk: no array holds the
/// (steps, steps, keys) decays.
template <class T, int kParts>
class KeyChunk {
  using P = Planes<T, kParts>;
  using V = typename P::V;
  using D = typename P::D;
  static constexpr std::int64_t kLanes = P::kLanes;

 public:
  KeyChunk(const TileSizes& sizes, std::int64_t steps) : steps_(steps), n(sizes) {}

  /// The transitions from the chunk's start up to each step, and after each to its end.
  void Products(const ForwardTiles<T>& t) const {
    for (std::int64_t c = 0; c < n.keys; c += kLanes) {
      V product = Ones<V>(d), after = Ones<V>(d);
      for (std::int64_t s = 0; s < steps_; ++s) {
        product = Mul(d, P::Load(t.a, Row(s) + c), product);
        P::Store(product, t.product, Row(s) + c);
      }
      for (std::int64_t s = steps_ - 1; s >= 0; --s) {
        P::Store(after, t.after, Row(s) + c);
        after = Mul(d, P::Load(t.a, Row(s) + c), after);
      }
    }
  }

  /// scores(s, t) = Σ over keys of k_s q_t times the real part of the decay from s to t.
  void Scores(const ForwardTiles<T>& t) const {
    std::fill_n(t.lanes, kKeyChunk * kKeyChunk * kTileColumns, T(0));
    for (std::int64_t c = 0; c < n.keys; c += kLanes) {
      for (std::int64_t s = 0; s < steps_; ++s) {
        const auto key = hn::LoadU(d, t.k + Row(s) + c);
        V decay = Ones<V>(d);
        for (std::int64_t to = s; to < steps_; ++to) {
          if (to > s) decay = Mul(d, P::Load(t.a, Row(to) + c), decay);
          AddScore(t, s, to, hn::Mul(key, hn::LoadU(d, t.q + Row(to) + c)), decay.re);
        }
      }
    }
    SumScores(t);
  }

  /// What dq, dk and da get of pairs of steps in the chunk. Also of the state before it and the
  /// carry after it: `read`, `written` and `last`. And the scores.
  void Gradients(const BackwardTiles<T>& t) const {
    std::fill_n(t.lanes, kKeyChunk * kKeyChunk * kTileColumns, T(0));
    for (std::int64_t c = 0; c < n.keys; c += kLanes) {
      Begin(t, c);
      V last = P::Load(t.last, c);
      for (std::int64_t r = 0; r < steps_; ++r) last = Step(t, c, r, last);
    }
    SumScores(t);
  }

 private:
  std::int64_t Row(std::int64_t step) const { return step * n.key_stride; }

  HWY_INLINE void AddScore(const ForwardTiles<T>& t, std::int64_t s, std::int64_t to,
                           hn::Vec<D> both, hn::Vec<D> decay) const {
    T* const lanes = t.lanes + (s * kKeyChunk + to) * kTileColumns;
    hn::StoreU(hn::MulAdd(both, decay, hn::LoadU(d, lanes)), d, lanes);
  }
  void SumScores(const ForwardTiles<T>& t) const {
    for (std::int64_t s = 0; s < steps_; ++s) {
      T* const row = t.scores + s * n.step_stride;
      std::fill_n(row, whole_tiles(steps_), T(0));
      for (std::int64_t to = s; to < steps_; ++to) {
        const auto lanes = hn::LoadU(d, t.lanes + (s * kKeyChunk + to) * kTileColumns);
        row[to] = hn::GetLane(hn::SumOfLanes(d, lanes));
      }
    }
  }

  /// dq from the state before the chunk, and the gradients of the products that begin there.
  void Begin(const BackwardTiles<T>& t, std::int64_t c) const {
    for (std::int64_t s = 0; s < steps_; ++s) {
      const auto query = hn::LoadU(d, t.q + Row(s) + c);
      const V read = P::Load(t.read, Row(s) + c), product = P::Load(t.product, Row(s) + c);
      V gathered = Conj(d, read);
      gathered.re = hn::Mul(query, gathered.re);
      if constexpr (kParts == 2) gathered.im = hn::Mul(query, gathered.im);
      P::Store(gathered, t.gathered, Row(s) + c);
      hn::StoreU(Mul(d, product, read).re, d, t.dq + Row(s) + c);
    }
  }

  /// Step r of docs/math.md's sum over the transitions; returns the next `last`.
  V Step(const BackwardTiles<T>& t, std::int64_t c, std::int64_t r, V last) const {
    const V conj = Conj(d, P::Load(t.a, Row(r) + c));
    const V after = P::Load(t.after, Row(r) + c), written = P::Load(t.written, Row(r) + c);
    const auto key = hn::LoadU(d, t.k + Row(r) + c);
    auto dk = Mul(d, Conj(d, after), written).re;
    V sum = Mul(d, Conj(d, after), last), decay = Ones<V>(d);
    for (std::int64_t to = r; to < steps_; ++to) {
      if (to > r) decay = Mul(d, P::Load(t.a, Row(to) + c), decay);
      const auto query = hn::LoadU(d, t.q + Row(to) + c);
      const auto both = hn::Mul(key, query);
      const auto similarity = hn::Set(d, t.similarities[r * n.step_stride + to]);
      const auto weight = hn::Mul(similarity, decay.re);
      const V gathered = P::Load(t.gathered, Row(to) + c);
      sum = MulAdd(d, Conj(d, decay), gathered, sum);
      P::Store(MulAdd(d, conj, gathered, Real<D>{hn::Mul(both, similarity)}), t.gathered,
               Row(to) + c);
      T* const dq = t.dq + Row(to) + c;
      hn::StoreU(hn::MulAdd(weight, key, hn::LoadU(d, dq)), d, dq);
      dk = hn::MulAdd(weight, query, dk);
      AddScore(t, r, to, both, decay.re);
    }
    hn::StoreU(dk, d, t.dk + Row(r) + c);
    P::Store(sum, t.da, Row(r) + c);
    V to_last = written;
    to_last.re = hn::Mul(key, written.re);
    if constexpr (kParts == 2) to_last.im = hn::Mul(key, written.im);
    return MulAdd(d, conj, last, to_last);
  }

  std::int64_t steps_;
  // NOLINTBEGIN(readability-identifier-naming): short in the products
  const TileSizes& n;
  D d;
  // NOLINTEND(readability-identifier-naming)
};

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_KEYS_INL_H_
