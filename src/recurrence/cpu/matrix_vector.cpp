// y = W x + b: what a decoding step does beside the recurrence's own.
#include <algorithm>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/matrix_vector.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// One row after the other: the whole matrix is then one stream through memory, which hardware
/// prefetchers follow. Four sums hide the latency of the fused multiply-add.
template <class S>
Accumulation<S> Dot(const S* row, const Accumulation<S>* x, std::int64_t columns) {
  using T = Accumulation<S>;
  const hn::ScalableTag<T> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<T>()));
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  std::int64_t c = 0;
  const auto add = [&](auto& sum, std::int64_t at) {
    sum = hn::MulAdd(LoadReal(d, row + at), hn::LoadU(d, x + at), sum);
  };
  for (; c + 4 * kLanes <= columns; c += 4 * kLanes) {
    add(s0, c), add(s1, c + kLanes), add(s2, c + 2 * kLanes), add(s3, c + 3 * kLanes);
  }
  for (; c + kLanes <= columns; c += kLanes) add(s0, c);
  T total = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
  ForTail<T, kLanes / 2>(columns, c, [&](auto tail, std::int64_t at) {
    const auto product = hn::Mul(LoadReal(tail, row + at), hn::LoadU(tail, x + at));
    total += hn::GetLane(hn::SumOfLanes(tail, product));
  });
  return total;
}

template <class S>
void DotRows(const MatrixVector& p, std::int64_t first, std::int64_t last) {
  using T = Accumulation<S>;
  const hn::CappedTag<T, 1> one;
  const auto* matrix = static_cast<const S*>(p.matrix);
  const auto* x = static_cast<const T*>(p.x);
  const auto* bias = static_cast<const S*>(p.bias);
  auto* y = static_cast<S*>(p.y);
  for (std::int64_t r = first; r < last; ++r) {
    auto sum = hn::Set(one, Dot(matrix + r * p.columns, x, p.columns));
    if (bias != nullptr) sum = hn::Add(sum, LoadReal(one, bias + r));
    StoreReal(one, sum, y + r, /*stream=*/false);
  }
}

void RunMatrixVector(const MatrixVector& p, std::int64_t first, std::int64_t last) {
  WithStorageOf(p.dtype, [&]<class S>() { DotRows<S>(p, first, last); });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunMatrixVector);
}  // namespace cpu

void run(const MatrixVector& p, const Executor& executor) {
  using namespace cpu;
  check("MatrixVector", {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  // A run of rows for each thread: where threads take turns at shorter runs, a core's prefetchers
  // fetch in vain what the other will read. And the same run to the same thread in every step, for
  // caches keep some of it.
  const std::int64_t bytes = p.rows * p.columns * static_cast<std::int64_t>(storage_bytes(p.dtype));
  const std::int64_t runs =
      std::max<std::int64_t>(1, std::min({bytes / kMatrixVectorRunBytes, p.rows,
                                          static_cast<std::int64_t>(executor.threads)}));
  fan_out(executor, runs, [&](std::int64_t run) {
    HWY_DYNAMIC_DISPATCH(RunMatrixVector)(p, p.rows * run / runs, p.rows * (run + 1) / runs);
  });
}

}  // namespace gateloop::recurrence
#endif
