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

#include "recurrence/cpu/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class S>
void DotRows(const MatrixVector& p, const Accumulation<S>* x, std::int64_t first,
             std::int64_t last) {
  const hn::CappedTag<Accumulation<S>, 1> one;
  const auto* matrix = static_cast<const S*>(p.matrix);
  const auto* bias = static_cast<const S*>(p.bias);
  auto* y = static_cast<S*>(p.y);
  for (std::int64_t r = first; r < last; ++r) {
    auto sum = hn::Set(one, Dot(matrix + r * p.columns, x, p.columns));
    if (bias != nullptr) sum = hn::Add(sum, LoadReal(one, bias + r));
    StoreReal(one, sum, y + r, /*stream=*/false);
  }
}

void RunMatrixVector(const MatrixVector& p, std::int64_t runs, const Executor& executor,
                     void* scratch) {
  WithStorageOf(p.dtype, [&]<class S>() {
    using T = Accumulation<S>;
    T* const x = static_cast<T*>(scratch);
    std::copy_n(static_cast<const T*>(p.x), p.columns, x);
    ArrangeForDot<S>(x, p.columns);
    fan_out(executor, runs, [&](std::int64_t run) {
      DotRows<S>(p, x, p.rows * run / runs, p.rows * (run + 1) / runs);
    });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunMatrixVector);
}  // namespace cpu

std::size_t scratch_bytes(const MatrixVector& p, int) {
  return static_cast<std::size_t>(std::max<std::int64_t>(0, p.columns)) *
         cpu::accumulation_bytes(p.dtype);
}

void run(const MatrixVector& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check("MatrixVector", {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  // A run of rows for each thread: where threads take turns at shorter runs, a core's prefetchers
  // fetch in vain what the other will read. And the same run to the same thread in every step, for
  // caches keep some of it.
  const std::int64_t bytes = p.rows * p.columns * static_cast<std::int64_t>(storage_bytes(p.dtype));
  const std::int64_t runs =
      std::max<std::int64_t>(1, std::min({bytes / kMatrixVectorRunBytes, p.rows,
                                          static_cast<std::int64_t>(executor.threads)}));
  HWY_DYNAMIC_DISPATCH(RunMatrixVector)(p, runs, executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
