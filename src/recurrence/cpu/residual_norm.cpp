// Residual connections with a norm, and their adjoint, each in two passes over rows in L1.
#include <algorithm>
#include <utility>

#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/parallel.h"
#include "recurrence/training.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/residual_norm.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// The normalised row is (row - mean) scale.
template <class T>
struct Statistics {
  T mean;
  T scale;
  bool constant;  // scale does not depend on the row: a norm below ε
};

template <class T>
Statistics<T> StatisticsOf(Norm norm, const T* row, std::int64_t n) {
  if (norm == Norm::kRms) {
    const T length = NormOf<T>(row, n);
    return {T(0), ScaleOf<T>(length, n), length < NormFloor<T>()};
  }
  const std::pair<T, T> of_layer = LayerStatistics(row, n);
  return {of_layer.first, of_layer.second, false};
}

template <class D, class T>
HWY_INLINE hn::Vec<D> Normalised(D d, const Statistics<T>& s, hn::Vec<D> value) {
  return hn::Mul(hn::Sub(value, hn::Set(d, s.mean)), hn::Set(d, s.scale));
}

void RunResidualNorm(const ResidualNorm& p, int slots, const Executor& executor) {
  WithStorageOf(p.dtype, [&]<class S>() {
    using T = Accumulation<S>;
    const std::int64_t n = p.columns;
    const T *gain = static_cast<const T*>(p.gain), *bias = static_cast<const T*>(p.bias);
    parallel(executor, slots, p.rows, [&](std::int64_t r, std::int64_t) {
      const T* row = static_cast<const T*>(p.x) + r * n;
      if (p.y) {
        T* const sum = static_cast<T*>(p.sum) + r * n;
        const S* const y = static_cast<const S*>(p.y) + r * n;
        ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
          hn::StoreU(hn::Add(hn::LoadU(d, row + c), LoadReal(d, y + c)), d, sum + c);
        });
        row = sum;
      }
      const auto statistics = StatisticsOf(p.norm, row, n);
      S* const narrow = p.normalised ? static_cast<S*>(p.normalised) + r * n : nullptr;
      T* const wide = p.normalised_wide ? static_cast<T*>(p.normalised_wide) + r * n : nullptr;
      ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
        const auto unit = Normalised(d, statistics, hn::LoadU(d, row + c));
        const auto scaled = hn::Mul(unit, hn::LoadU(d, gain + c));
        const auto value = bias ? hn::Add(scaled, hn::LoadU(d, bias + c)) : scaled;
        if (narrow) StoreReal(d, value, narrow + c, /*stream=*/false);
        if (wide) hn::StoreU(value, d, wide + c);
      });
    });
  });
}

/// The gradients that reach one row, null where there are none.
template <class S>
struct RowGradients {
  const Accumulation<S>* sum;
  const S* normalised;
  const Accumulation<S>* normalised_wide;
};

/// With u the normalised row and d its gradient: dgain += u d, dbias += d, and
/// dx = dsum + scale (gain d - mean(gain d) - u mean(u gain d)). For kRms without the second term.
template <class S>
void BackwardRow(const ResidualNormBackward& p, std::int64_t r, Accumulation<S>* flowing,
                 Accumulation<S>* dgain, Accumulation<S>* dbias) {
  using T = Accumulation<S>;
  const std::int64_t n = p.columns;
  const auto at = [&]<class X>(X* first) { return first ? first + r * n : first; };
  const RowGradients<S> in{at(static_cast<const T*>(p.dsum)),
                           at(static_cast<const S*>(p.dnormalised)),
                           at(static_cast<const T*>(p.dnormalised_wide))};
  const T *row = at(static_cast<const T*>(p.sum)), *gain = static_cast<const T*>(p.gain);
  T* const dx = at(static_cast<T*>(p.dx));
  S* const dy = at(static_cast<S*>(p.dy));
  const auto statistics = StatisticsOf(p.norm, row, n);

  // flowing = gain d, which stays in L1 for the second pass.
  const hn::ScalableTag<T> whole;
  auto sums = hn::Zero(whole), products = hn::Zero(whole);
  T sum = 0, product = 0;
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    auto gradient = in.normalised ? LoadReal(d, in.normalised + c) : hn::Zero(d);
    if (in.normalised_wide) gradient = hn::Add(gradient, hn::LoadU(d, in.normalised_wide + c));
    const auto unit = Normalised(d, statistics, hn::LoadU(d, row + c));
    hn::StoreU(hn::MulAdd(unit, gradient, hn::LoadU(d, dgain + c)), d, dgain + c);
    if (dbias) hn::StoreU(hn::Add(gradient, hn::LoadU(d, dbias + c)), d, dbias + c);
    const auto gained = hn::Mul(gradient, hn::LoadU(d, gain + c));
    hn::StoreU(gained, d, flowing + c);
    if constexpr (IsWhole(decltype(d)())) {
      sums = hn::Add(sums, gained);
      products = hn::MulAdd(unit, gained, products);
    } else {
      sum += hn::GetLane(hn::SumOfLanes(d, gained));
      product += hn::GetLane(hn::SumOfLanes(d, hn::Mul(unit, gained)));
    }
  });
  const auto mean = [&](auto parts, T rest) {
    return (hn::GetLane(hn::SumOfLanes(whole, parts)) + rest) / static_cast<T>(n);
  };
  const T shift = p.norm == Norm::kLayer ? mean(sums, sum) : T(0);
  const T along = statistics.constant ? T(0) : mean(products, product);
  ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto unit = Normalised(d, statistics, hn::LoadU(d, row + c));
    const auto centred = hn::Sub(hn::LoadU(d, flowing + c), hn::Set(d, shift));
    const auto across = hn::NegMulAdd(unit, hn::Set(d, along), centred);
    auto gradient = hn::Mul(across, hn::Set(d, statistics.scale));
    if (in.sum) gradient = hn::Add(gradient, hn::LoadU(d, in.sum + c));
    hn::StoreU(gradient, d, dx + c);
    if (dy) StoreReal(d, gradient, dy + c, /*stream=*/false);
  });
}

/// scratch: (groups, 2, columns) sums of dgain and dbias, then (slots, columns) for BackwardRow.
void RunResidualNormBackward(const ResidualNormBackward& p, std::int64_t groups, int slots,
                             const Executor& executor, void* scratch) {
  WithStorageOf(p.dtype, [&]<class S>() {
    using T = Accumulation<S>;
    const std::int64_t n = p.columns;
    T* const sums = static_cast<T*>(scratch);
    T* const rows = sums + groups * 2 * n;
    parallel(executor, slots, groups, [&](std::int64_t group, std::int64_t slot) {
      T* const dgain = sums + group * 2 * n;
      std::fill_n(dgain, 2 * n, T(0));
      const std::int64_t end = std::min(p.rows, (group + 1) * kNormRows);
      for (std::int64_t r = group * kNormRows; r < end; ++r) {
        BackwardRow<S>(p, r, rows + slot * n, dgain, p.dbias ? dgain + n : nullptr);
      }
    });
    const auto total = [&](void* to, std::int64_t offset) {
      if (!to) return;
      T* const result = static_cast<T*>(to);
      std::fill_n(result, n, T(0));
      for (std::int64_t group = 0; group < groups; ++group) {
        AddRow(sums + group * 2 * n + offset, result, n);
      }
    };
    fan_out(executor, 1, [&](std::int64_t) {
      total(p.dgain, 0);
      total(p.dbias, n);
    });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunResidualNorm);
HWY_EXPORT(RunResidualNormBackward);
}  // namespace cpu

std::size_t scratch_bytes(const ResidualNorm&, int) { return 0; }

std::size_t scratch_bytes(const ResidualNormBackward& p, int threads) {
  const std::int64_t rows = 2 * cpu::norm_groups(p.rows) + std::max(1, threads);
  return static_cast<std::size_t>(rows * std::max<std::int64_t>(0, p.columns)) *
         cpu::accumulation_bytes(p.dtype);
}

void run(const ResidualNorm& p, const Executor& executor, void*) {
  using namespace cpu;
  check("ResidualNorm", {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  HWY_DYNAMIC_DISPATCH(RunResidualNorm)
  (p, slots_for(p.rows * p.columns, executor.threads), executor);
}

void run(const ResidualNormBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check("ResidualNormBackward", {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  HWY_DYNAMIC_DISPATCH(RunResidualNormBackward)
  (p, norm_groups(p.rows), slots_for(p.rows * p.columns, executor.threads), executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
