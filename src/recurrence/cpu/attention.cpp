// Causal attention of one head over stored keys and values. A group of queries gets its scores,
// block of keys by block; then its weights; then sums of values.
#include <algorithm>
#include <cmath>

#include "recurrence/inference.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/attention.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/gates-inl.h"
#include "recurrence/cpu/rows-inl.h"
#include "recurrence/cpu/sums_of_lanes-inl.h"
#include "recurrence/cpu/vectors-inl.h"

#ifndef GATELOOP_RECURRENCE_CPU_ATTENTION_ONCE_
#define GATELOOP_RECURRENCE_CPU_ATTENTION_ONCE_
namespace gateloop::recurrence::cpu {

/// Queries whose scores are kept: they read each block of keys and of values while it is in L2.
inline constexpr std::int64_t kQueryGroup = 32;
/// Keys of a block, 64 KiB of them with 64 channels.
inline constexpr std::int64_t kKeyBlock = 256;
/// Keys whose products with a query are summed over their lanes together.
inline constexpr std::int64_t kKeysTogether = 4;
static_assert(kKeyBlock % kKeysTogether == 0);

/// Keys [begin, end).
struct KeyRange {
  std::int64_t begin, end;
};

/// What one query reads.
inline KeyRange keys_of(const AttentionHead& p, std::int64_t query) {
  const std::int64_t end = p.count + query;
  return {p.window == 0 ? 0 : std::max(std::int64_t{0}, end - p.window), end};
}

/// The scores of one query, for every key that its group reads: whole cache lines.
inline std::int64_t score_stride(const AttentionHead& p) {
  const std::int64_t all = keys_of(p, p.queries - 1).end;
  const std::int64_t group = p.window + std::min(kQueryGroup, p.queries) - 1;
  return ((p.window == 0 ? all : std::min(all, group)) + 15) / 16 * 16;
}

}  // namespace gateloop::recurrence::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// Queries that one load of a key, or of a value, serves: their sums stay in registers.
inline constexpr std::size_t kScoreQueries = hn::MaxLanes(hn::ScalableTag<float>()) > 8 ? 4 : 2;
inline constexpr std::size_t kValueQueries = 8;

/// `count` queries from `first` on, and their scores of `keys`.
struct QueryGroup {
  std::int64_t first, count;
  KeyRange keys;
  float* scores;
  std::int64_t stride;

  /// From the score of `key` on.
  float* row(std::int64_t query, std::int64_t key) const {
    return scores + query * stride + key - keys.begin;
  }
};

/// q · k_s of kQueries queries from `query` on and `range` of keys.
template <std::size_t kQueries>
void ScoreKeys(const AttentionHead& p, const QueryGroup& group, std::int64_t query,
               KeyRange range) {
  using V = hn::Vec<hn::ScalableTag<float>>;
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  constexpr auto kKeys = static_cast<std::size_t>(kKeysTogether);
  const float* const q = p.q + (group.first + query) * p.q_stride;
  for (std::int64_t s = range.begin; s < range.end; s += kKeysTogether) {
    const float* keys[kKeys];
    for (std::size_t i = 0; i < kKeys; ++i)
      keys[i] = p.keys + std::min(s + static_cast<std::int64_t>(i), range.end - 1) * p.dim_head;
    V sums[kQueries][kKeys];
    for (auto& row : sums)
      for (auto& sum : row) sum = hn::Zero(d);
    std::int64_t c = 0;
    for (; c + kLanes <= p.dim_head; c += kLanes) {
      V key[kKeys];
      for (std::size_t i = 0; i < kKeys; ++i) key[i] = hn::LoadU(d, keys[i] + c);
      for (std::size_t m = 0; m < kQueries; ++m) {
        const V part = hn::LoadU(d, q + static_cast<std::int64_t>(m) * p.q_stride + c);
        for (std::size_t i = 0; i < kKeys; ++i) sums[m][i] = hn::MulAdd(part, key[i], sums[m][i]);
      }
    }
    for (std::size_t m = 0; m < kQueries; ++m) {
      const float* const own = q + static_cast<std::int64_t>(m) * p.q_stride;
      float* const to = group.row(query + static_cast<std::int64_t>(m), s);
      StoreSumsOfLanes(d, sums[m][0], sums[m][1], sums[m][2], sums[m][3], to);
      ForTail<float, static_cast<std::size_t>(kLanes) / 2>(
          p.dim_head, c, [&](auto tail, std::int64_t at) HWY_ATTR {
            for (std::size_t i = 0; i < kKeys; ++i) {
              const auto product =
                  hn::Mul(hn::LoadU(tail, own + at), hn::LoadU(tail, keys[i] + at));
              to[i] += hn::GetLane(hn::SumOfLanes(tail, product));
            }
          });
    }
  }
}

/// Channels [c, c + kVectors vectors) of y of kQueries queries += the weights of keys times their
/// values.
template <std::size_t kQueries, std::size_t kVectors, class D>
HWY_INLINE void AddValues(D d, const AttentionHead& p, const QueryGroup& group, std::int64_t query,
                          KeyRange range, std::int64_t c) {
  hn::Vec<D> sums[kQueries][kVectors];
  const auto at = [&](std::size_t m, std::size_t v) {
    return p.y + (group.first + query + static_cast<std::int64_t>(m)) * p.y_stride + c +
           static_cast<std::int64_t>(v * hn::MaxLanes(D()));
  };
  for (std::size_t m = 0; m < kQueries; ++m)
    for (std::size_t v = 0; v < kVectors; ++v) sums[m][v] = hn::LoadU(d, at(m, v));
  const float* const weights = group.row(query, range.begin);
  for (std::int64_t s = range.begin; s < range.end; ++s) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      const auto value = hn::LoadU(d, p.values + s * p.dim_head + c + v * hn::MaxLanes(D()));
      for (std::size_t m = 0; m < kQueries; ++m) {
        const auto weight =
            hn::Set(d, weights[static_cast<std::int64_t>(m) * group.stride + s - range.begin]);
        sums[m][v] = hn::MulAdd(weight, value, sums[m][v]);
      }
    }
  }
  for (std::size_t m = 0; m < kQueries; ++m)
    for (std::size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[m][v], d, at(m, v));
}

/// All channels. One query alone takes several vectors at once: sums that depend on each other
/// wait.
template <std::size_t kQueries>
void GatherValues(const AttentionHead& p, const QueryGroup& group, std::int64_t query,
                  KeyRange range) {
  if (range.begin >= range.end) return;
  constexpr std::size_t kVectors = kQueries == 1 ? 4 : 1;
  const hn::ScalableTag<float> whole;
  constexpr auto kRun =
      static_cast<std::int64_t>(kVectors * hn::MaxLanes(hn::ScalableTag<float>()));
  std::int64_t c = 0;
  for (; c + kRun <= p.dim_head; c += kRun)
    AddValues<kQueries, kVectors>(whole, p, group, query, range, c);
  ForEachVector<float>(p.dim_head - c, [&](auto d, std::int64_t rest) HWY_ATTR {
    AddValues<kQueries, 1>(d, p, group, query, range, c + rest);
  });
}

/// f<kTogether>(query) for as many queries as fit, then f<1>(query) for the others.
template <std::size_t kTogether, class F>
void ForEachQuery(std::int64_t count, const F& f) {
  std::int64_t query = 0;
  constexpr auto kStep = static_cast<std::int64_t>(kTogether);
  for (; query + kStep <= count; query += kStep) f.template operator()<kTogether>(query);
  for (; query < count; ++query) f.template operator()<1>(query);
}

inline void MultiplyBy(float factor, float* x, std::int64_t count) {
  ForEachVector<float>(count, [&](auto d, std::int64_t c) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(d, x + c), hn::Set(d, factor)), d, x + c);
  });
}

/// exp(x - most) in place, where `count` numbers of x are at most `most`; returns their sum.
inline float ExponentialsBelow(float most, float* x, std::int64_t count) {
  return SumOf<float>(count, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto below = hn::Sub(hn::Set(d, most), hn::LoadU(d, x + c));
    // Beyond the clamp's limit the exponential is zero.
    const auto far = hn::Gt(below, hn::Set(d, ExpConstants<float>::kHighest));
    const auto finite = hn::IfThenZeroElse(far, ExpDecay(d, ClampDecay(d, below)).e);
    const auto e = hn::IfThenElse(hn::IsNaN(below), below, finite);  // a scalar clamp drops NaN
    hn::StoreU(e, d, x + c);
    return e;
  });
}

/// The `count` scores, q · k, of a query become its weights.
inline void MakeWeights(const AttentionHead& p, float* scores, std::int64_t count) {
  MultiplyBy(1 / std::sqrt(static_cast<float>(p.dim_head)), scores, count);
  if (!p.softmax) return;
  const float most = *std::max_element(scores, scores + count);
  MultiplyBy(1 / ExponentialsBelow(most, scores, count), scores, count);
}

/// The sums of values of kQueries queries over one block of keys. Keys out of reach are left out,
/// not weighed by zero, which would let an infinity through.
template <std::size_t kQueries>
void GatherBlock(const AttentionHead& p, const QueryGroup& group, std::int64_t query,
                 KeyRange block) {
  const auto within = [&](std::int64_t m, KeyRange range) -> KeyRange {
    const KeyRange own = keys_of(p, group.first + m);
    return {std::max(range.begin, own.begin), std::min(range.end, own.end)};
  };
  const std::int64_t last = query + static_cast<std::int64_t>(kQueries) - 1;
  KeyRange shared = within(query, within(last, block));
  if (shared.begin >= shared.end) shared = {block.end, block.end};
  GatherValues<kQueries>(p, group, query, shared);
  for (std::int64_t m = query; m <= last; ++m) {
    GatherValues<1>(p, group, m, within(m, {block.begin, shared.begin}));
    GatherValues<1>(p, group, m, within(m, {shared.end, block.end}));
  }
}

void RunAttentionHead(const AttentionHead& p, float* scratch) {
  for (std::int64_t first = 0; first < p.queries; first += kQueryGroup) {
    const std::int64_t count = std::min(kQueryGroup, p.queries - first);
    const KeyRange keys{keys_of(p, first).begin, keys_of(p, first + count - 1).end};
    const QueryGroup group{first, count, keys, scratch, score_stride(p)};
    const auto for_each_block = [&](const auto& f) {
      for (std::int64_t begin = keys.begin; begin < keys.end; begin += kKeyBlock)
        f(KeyRange{begin, std::min(keys.end, begin + kKeyBlock)});
    };
    for_each_block([&](KeyRange block) {
      ForEachQuery<kScoreQueries>(count, [&]<std::size_t kQueries>(std::int64_t query) {
        ScoreKeys<kQueries>(p, group, query, block);
      });
    });
    for (std::int64_t query = 0; query < count; ++query) {
      const KeyRange own = keys_of(p, first + query);
      MakeWeights(p, group.row(query, own.begin), own.end - own.begin);
      std::fill_n(p.y + (first + query) * p.y_stride, p.dim_head, 0.0f);
    }
    for_each_block([&](KeyRange block) {
      ForEachQuery<kValueQueries>(count, [&]<std::size_t kQueries>(std::int64_t query) {
        GatherBlock<kQueries>(p, group, query, block);
      });
    });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunAttentionHead);
}  // namespace cpu

using namespace cpu;

std::int64_t scratch_numbers(const AttentionHead& p) {
  return std::min(kQueryGroup, p.queries) * score_stride(p);
}

void run(const AttentionHead& p, float* scratch) {
  HWY_DYNAMIC_DISPATCH(RunAttentionHead)(p, scratch);
}

}  // namespace gateloop::recurrence
#endif
