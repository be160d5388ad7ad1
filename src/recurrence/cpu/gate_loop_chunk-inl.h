// One chunk of GateLoop, forward and back, as products of small matrices (docs/math.md).
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "recurrence/cpu/gate_loop_keys-inl.h"
#include "recurrence/cpu/gate_loop_tiles.h"
#include "recurrence/cpu/rows-inl.h"
#include "recurrence/cpu/tile_products-inl.h"

#if defined(GATELOOP_RECURRENCE_CPU_GATE_LOOP_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_GATE_LOOP_CHUNK_INL_H_
#undef GATELOOP_RECURRENCE_CPU_GATE_LOOP_CHUNK_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_GATE_LOOP_CHUNK_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// to = factor from.
template <class T>
void ScaleRow(T factor, const T* from, T* to, std::int64_t n) {
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::Set(d, factor), hn::LoadU(d, from + c)), d, to + c);
  });
}

/// to = factors from, each times `sign`.
template <class T>
void ScaleRow(const T* factors, T sign, const T* from, T* to, std::int64_t n) {
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto factor = hn::Mul(hn::Set(d, sign), hn::LoadU(d, factors + c));
    hn::StoreU(hn::Mul(factor, hn::LoadU(d, from + c)), d, to + c);
  });
}

/// to += factor from.
template <class T>
void AddScaled(T factor, const T* from, T* to, std::int64_t n) {
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    hn::StoreU(hn::MulAdd(hn::Set(d, factor), hn::LoadU(d, from + c), hn::LoadU(d, to + c)), d,
               to + c);
  });
}

template <class T>
T DotRows(const T* x, const T* y, std::int64_t n) {
  return SumOf<T>(n, [&](auto d, std::int64_t c)
                         HWY_ATTR { return hn::Mul(hn::LoadU(d, x + c), hn::LoadU(d, y + c)); });
}

/// to = factor from + add, over n numbers, whole groups of columns.
template <class T, int kParts>
void AdvanceRow(std::array<T, 2> factor, std::array<T*, 2> from, std::array<T*, 2> add,
                std::array<T*, 2> to, std::int64_t n) {
  using P = Planes<T, kParts>;
  const typename P::D d;
  const auto a = P::Set(factor[0], factor[1]);
  for (std::int64_t c = 0; c < n; c += P::kLanes) {
    P::Store(MulAdd(d, a, P::Load(from.data(), c), P::Load(add.data(), c)), to.data(), c);
  }
}

/// A chunk of `steps` steps. kParts is 2 where transitions are complex.
template <class T, int kParts, bool kPerKey>
class ChunkForward {
 public:
  ChunkForward(const TileSizes& sizes, const ForwardTiles<T>& tiles, std::int64_t steps)
      : n(sizes), t(tiles), steps_(steps) {}

  /// What the transitions `a` make of each other.
  void Decays() const {
    if constexpr (kPerKey) {
      KeyChunk<T, kParts>(n, steps_).Products(t);
    } else {
      Pairs();
    }
  }

  /// k_weighted = the transitions after each step times k.
  void WeightKeys() const {
    for (int part = 0; part < kParts; ++part) {
      for (std::int64_t s = 0; s < steps_; ++s) {
        T* const to = Keys(t.k_weighted[part])[s];
        if constexpr (kPerKey) {
          ScaleRow(Keys(t.after[part])[s], T(1), Keys(t.k)[s], to, n.keys);
        } else {
          ScaleRow(Square(t.decay[part])[s][steps_ - 1], Keys(t.k)[s], to, n.keys);
        }
      }
    }
  }

  /// sum = Σ_s decay(s, last) k_s^T v_s. Needs k, v and the decays.
  void Sum() const {
    WeightKeys();
    for (int part = 0; part < kParts; ++part) {
      Product<false>(n.keys, n.values, steps_, Keys(t.k_weighted[part]).Transposed(), Values(t.v),
                     Values(t.sum[part]));
    }
  }

  /// q_weighted = the transitions up to each step times q, conjugated.
  void WeightQueries() const {
    for (int part = 0; part < kParts; ++part) {
      const T sign = part == 0 ? T(1) : T(-1);
      for (std::int64_t s = 0; s < steps_; ++s) {
        T* const to = Keys(t.q_weighted[part])[s];
        if constexpr (kPerKey) {
          ScaleRow(Keys(t.product[part])[s], sign, Keys(t.q)[s], to, n.keys);
        } else {
          ScaleRow(sign * t.product[part][s], Keys(t.q)[s], to, n.keys);
        }
      }
    }
  }

  /// scores(s, t) = k_s · q_t for s <= t.
  void Scores() const {
    Transpose(steps_, n.keys, Keys(t.q), Square(t.q_across));
    ProductAbove(steps_, n.keys, Keys(t.k).AsFactor(), Square(t.q_across), Square(t.scores));
  }

  /// y = the chunk's own part, and q times the state before it where there is one.
  void Output(bool has_state) const {
    if constexpr (kPerKey) {
      KeyChunk<T, kParts>(n, steps_).Scores(t);
    } else {
      Scores();
      MultiplyByDecay(t.scores);
    }
    LowerProduct<false>(steps_, n.values, Square(t.scores).Transposed(), Values(t.v), Values(t.y));
    if (!has_state) return;
    WeightQueries();
    for (int part = 0; part < kParts; ++part) {
      Product<true>(steps_, n.values, n.keys, Keys(t.q_weighted[part]).AsFactor(),
                    Values(t.state[part]), Values(t.y));
    }
  }

  /// (re, im) of the transitions over the whole chunk, of a key.
  std::array<T, 2> Last(std::int64_t key) const {
    const std::int64_t at = kPerKey ? (steps_ - 1) * n.key_stride + key : steps_ - 1;
    return {t.product[0][at], kParts == 2 ? t.product[1][at] : T(0)};
  }

 protected:
  Tile<T> Keys(T* tile) const { return {tile, n.key_stride}; }
  Tile<T> Values(T* tile) const { return {tile, n.value_stride}; }
  Tile<T> Square(T* tile) const { return {tile, n.step_stride}; }

  /// scores(s, t) times the real part of decay(s, t), which is zero below the diagonal.
  void MultiplyByDecay(T* scores) const {
    for (std::int64_t r = 0; r < steps_; ++r) {
      const std::int64_t begin = r / kTileColumns * kTileColumns;
      MultiplyRow(Square(t.decay[0])[r] + begin, Square(scores)[r] + begin,
                  whole_tiles(steps_) - begin);
    }
  }

  const TileSizes& n;
  const ForwardTiles<T>& t;
  std::int64_t steps_;

 private:
  /// Fills `decay` and `product` from `a`. Row r of the decay follows from row r + 1: every entry
  /// is a product of the transitions themselves, exact at zero and of magnitude at most 1.
  void Pairs() const {
    for (std::int64_t r = steps_ - 1; r >= 0; --r) {
      const std::int64_t begin = r / kTileColumns * kTileColumns;
      T* const re = Square(t.decay[0])[r];
      T* const im = Square(t.decay[1])[r];
      const bool first_of_group = r == steps_ - 1 || (r + 1) % kTileColumns == 0;
      if (first_of_group) ZeroGroup(re, im, begin);
      if (r + 1 < steps_) NextDecays(r, first_of_group ? begin + kTileColumns : begin, re, im);
      re[r] = 1;
    }
    for (std::int64_t s = 0; s < steps_; ++s) {
      const T re = Square(t.decay[0])[0][s];
      if constexpr (kParts == 1) {
        t.product[0][s] = t.a[0][0] * re;
      } else {
        const T im = Square(t.decay[1])[0][s];
        t.product[0][s] = t.a[0][0] * re - t.a[1][0] * im;
        t.product[1][s] = t.a[0][0] * im + t.a[1][0] * re;
      }
    }
  }

  void ZeroGroup(T* re, T* im, std::int64_t begin) const {
    const std::int64_t end = begin + kTileColumns;
    std::fill(re + begin, re + end, T(0));
    if constexpr (kParts == 2) std::fill(im + begin, im + end, T(0));
  }

  /// decay(r, ·) = a_{r+1} decay(r + 1, ·) from column `begin` on.
  void NextDecays(std::int64_t r, std::int64_t begin, T* re, T* im) const {
    const T a_re = t.a[0][r + 1];
    const T* const next_re = Square(t.decay[0])[r + 1];
    const std::int64_t count = whole_tiles(steps_) - begin;
    if constexpr (kParts == 1) {
      ScaleRow(a_re, next_re + begin, re + begin, count);
    } else {
      const T a_im = t.a[1][r + 1];
      const T* const next_im = Square(t.decay[1])[r + 1];
      ForEachVector<T>(count, [&](auto d, std::int64_t i) HWY_ATTR {
        const std::int64_t c = begin + i;
        const Complex<decltype(d)> a{hn::Set(d, a_re), hn::Set(d, a_im)};
        const auto product = Mul(d, a, {hn::LoadU(d, next_re + c), hn::LoadU(d, next_im + c)});
        hn::StoreU(product.re, d, re + c);
        hn::StoreU(product.im, d, im + c);
      });
    }
  }
};

/// The gradients of a chunk. `carry` is the gradient of the state after it, `state` the state
/// before.
template <class T, int kParts, bool kPerKey>
class ChunkBackward : public ChunkForward<T, kParts, kPerKey> {
  using Base = ChunkForward<T, kParts, kPerKey>;
  using Base::Keys, Base::Values, Base::Square, Base::MultiplyByDecay, Base::n, Base::steps_;

 public:
  ChunkBackward(const TileSizes& sizes, const BackwardTiles<T>& tiles, std::int64_t steps)
      : Base(sizes, tiles, steps), t(tiles) {}

  /// sum = Σ_t conj(product_t) q_t^T dy_t, what the chunk adds to the gradient of the state before
  /// it. Needs q, dy and the decays.
  void Sum() const {
    Base::WeightQueries();
    for (int part = 0; part < kParts; ++part) {
      Product<false>(n.keys, n.values, steps_, Keys(t.q_weighted[part]).Transposed(), Values(t.dy),
                     Values(t.sum[part]));
    }
  }

  /// Fills dq, dk, dv and da, from everything else.
  void Gradients() const {
    Transpose(steps_, n.values, Values(t.dy), Square(t.dy_across));
    ProductAbove(steps_, n.values, Values(t.v).AsFactor(), Square(t.dy_across),
                 Square(t.similarities));
    for (int part = 0; part < kParts; ++part) {
      Transpose(n.keys, n.values, Values(t.state[part]), Keys(t.state_across[part]));
      Product<false>(steps_, n.keys, n.values, Values(t.dy).AsFactor(), Keys(t.state_across[part]),
                     Keys(t.read[part]));
      Transpose(n.keys, n.values, Values(t.carry[part]), Keys(t.carry_across[part]));
      Product<false>(steps_, n.keys, n.values, Values(t.v).AsFactor(), Keys(t.carry_across[part]),
                     Keys(t.written[part]));
    }
    StateTimesCarry();
    if constexpr (kPerKey) {
      KeyChunk<T, kParts>(n, steps_).Gradients(t);
    } else {
      HeadGradients();
    }
    Base::WeightKeys();
    UpperProduct<false>(steps_, n.values, Square(t.scores).AsFactor(), Values(t.dy), Values(t.dv));
    for (int part = 0; part < kParts; ++part) {
      Product<true>(steps_, n.values, n.keys, Keys(t.k_weighted[part]).AsFactor(),
                    Values(t.carry[part]), Values(t.dv));
    }
  }

 private:
  struct Number {
    T re, im;
  };

  /// dq, dk and da where a head has one transition a step, and the scores times their decay.
  void HeadGradients() const {
    Base::Scores();
    Transitions();
    MultiplyByDecay(t.scores);
    MultiplyByDecay(t.similarities);
    UpperProduct<false>(steps_, n.keys, Square(t.similarities).AsFactor(), Keys(t.q), Keys(t.dk));
    LowerProduct<false>(steps_, n.keys, Square(t.similarities).Transposed(), Keys(t.k), Keys(t.dq));
    for (int part = 0; part < kParts; ++part) {
      for (std::int64_t s = 0; s < steps_; ++s) {
        const T product = part == 0 ? t.product[0][s] : -t.product[1][s];
        AddScaled(product, Keys(t.read[part])[s], Keys(t.dq)[s], n.keys);
        AddScaled(Square(t.decay[part])[s][steps_ - 1], Keys(t.written[part])[s], Keys(t.dk)[s],
                  n.keys);
      }
    }
  }

  /// da_r = Σ over s < r <= t of (gradient of the product from s to t) conj(that product without
  /// a_r). `gathered` holds the sums over s; the state before the chunk counts as step -1, that
  /// after it as step `steps`. Nothing is divided: a zero transition is as good.
  void Transitions() const {
    for (int part = 0; part < kParts; ++part) {
      std::fill_n(t.gathered[part], whole_tiles(steps_), T(0));
      for (std::int64_t s = 0; s < steps_; ++s) {
        const T dot = DotRows(Keys(t.q)[s], Keys(t.read[part])[s], n.keys);
        t.gathered[part][s] = part == 0 ? dot : -dot;
      }
    }
    Number last{*t.last[0], kParts == 2 ? *t.last[1] : T(0)};
    for (std::int64_t r = 0; r < steps_; ++r) {
      const Number inside = GatherRow(r);
      const T d_re = Square(t.decay[0])[r][steps_ - 1];
      const T to_last_re = DotRows(Keys(t.k)[r], Keys(t.written[0])[r], n.keys);
      if constexpr (kParts == 1) {
        t.da[0][r] = inside.re + last.re * d_re;
        last.re = t.a[0][r] * last.re + to_last_re;
      } else {
        const T d_im = Square(t.decay[1])[r][steps_ - 1];
        const T to_last_im = DotRows(Keys(t.k)[r], Keys(t.written[1])[r], n.keys);
        t.da[0][r] = inside.re + last.re * d_re + last.im * d_im;
        t.da[1][r] = inside.im + last.im * d_re - last.re * d_im;
        last = {t.a[0][r] * last.re + t.a[1][r] * last.im + to_last_re,
                t.a[0][r] * last.im - t.a[1][r] * last.re + to_last_im};
      }
    }
  }

  /// last = Σ carry conj(state), over a key's values or over all.
  void StateTimesCarry() const {
    for (int part = 0; part < 2; ++part) std::fill_n(t.last[part], n.transition(), T(0));
    for (std::int64_t k = 0; k < n.keys; ++k) {
      const auto dot = [&](T* x, T* y) { return DotRows(Values(x)[k], Values(y)[k], n.values); };
      const std::int64_t at = kPerKey ? k : 0;
      t.last[0][at] += dot(t.carry[0], t.state[0]);
      if constexpr (kParts == 2) {
        t.last[0][at] += dot(t.carry[1], t.state[1]);
        t.last[1][at] += dot(t.carry[1], t.state[0]) - dot(t.carry[0], t.state[1]);
      }
    }
  }

  /// Σ_t gathered_t conj(decay(r, t)); then gathered_t = conj(a_r) gathered_t + scores(r, t)
  /// similarities(r, t). Entries of steps before r are not used again: decays there are zero.
  Number GatherRow(std::int64_t r) const {
    using P = Planes<T, kParts>;
    using D = typename P::D;
    const D d;
    const auto a = P::Set(t.a[0][r], kParts == 2 ? -t.a[1][r] : T(0));
    auto sum = P::Set(T(0), T(0));
    for (std::int64_t c = r / kTileColumns * kTileColumns; c < whole_tiles(steps_);
         c += P::kLanes) {
      const auto gathered = P::Load(t.gathered, c);
      sum = MulAdd(d, Conj(d, P::Load(t.decay, r * n.step_stride + c)), gathered, sum);
      const auto score = hn::LoadU(d, Square(t.scores)[r] + c);
      const auto similarity = hn::LoadU(d, Square(t.similarities)[r] + c);
      P::Store(MulAdd(d, a, gathered, Real<D>{hn::Mul(score, similarity)}), t.gathered, c);
    }
    Number total{hn::GetLane(hn::SumOfLanes(d, sum.re)), 0};
    if constexpr (kParts == 2) total.im = hn::GetLane(hn::SumOfLanes(d, sum.im));
    return total;
  }

  const BackwardTiles<T>& t;  // NOLINT(readability-identifier-naming): short in the products
};

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_GATE_LOOP_CHUNK_INL_H_
