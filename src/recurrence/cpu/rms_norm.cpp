// The norm of rows and its adjoint, each in two passes over a row that stays in L1.
#include <algorithm>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/rms_norm.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

void RunRmsNorm(const RmsNorm& p, int slots, const Executor& executor) {
  WithStorageOf(p.dtype, [&]<class S>() {
    const S *x = static_cast<const S*>(p.x), *gain = static_cast<const S*>(p.gain);
    S* const y = static_cast<S*>(p.y);
    parallel(executor, slots, p.rows, [&](std::int64_t r, std::int64_t) {
      RmsNormRow(x + r * p.columns, gain, p.columns, y + r * p.columns);
    });
  });
}

/// With n = √columns / max(‖x‖, ε): dgain += n x dy, and dx = n (gain dy - x (x · gain dy) / ‖x‖²).
/// Where the norm is below ε, dx is without its second term.
template <class S>
void BackwardRow(const S* x, const S* gain, const S* dy, std::int64_t columns, S* dx,
                 Accumulation<S>* dgain) {
  using T = Accumulation<S>;
  const T norm = NormOf<T>(x, columns);
  const T scale = ScaleOf<S>(norm, columns);
  const auto gained = [&](auto d, std::int64_t c)
                          HWY_ATTR { return hn::Mul(LoadReal(d, gain + c), LoadReal(d, dy + c)); };
  const T along = SumOf<T>(columns, [&](auto d, std::int64_t c) HWY_ATTR {
    return hn::Mul(LoadReal(d, x + c), gained(d, c));
  });
  const T shrink = norm < NormFloor<S>() ? T(0) : along / norm / norm;
  ForEachVector<T>(columns, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto s = hn::Set(d, scale), value = LoadReal(d, x + c);
    const auto across = hn::NegMulAdd(value, hn::Set(d, shrink), gained(d, c));
    StoreReal(d, hn::Mul(s, across), dx + c, /*stream=*/false);
    const auto part = hn::Mul(hn::Mul(s, value), LoadReal(d, dy + c));
    hn::StoreU(hn::Add(hn::LoadU(d, dgain + c), part), d, dgain + c);
  });
}

void RunRmsNormBackward(const RmsNormBackward& p, std::int64_t groups, int slots,
                        const Executor& executor, void* scratch) {
  WithStorageOf(p.dtype, [&]<class S>() {
    using T = Accumulation<S>;
    const std::int64_t n = p.columns;
    const S *x = static_cast<const S*>(p.x), *gain = static_cast<const S*>(p.gain),
            *dy = static_cast<const S*>(p.dy);
    S* const dx = static_cast<S*>(p.dx);
    T* const sums = static_cast<T*>(scratch);  // (groups + 1, columns); the last is their sum
    parallel(executor, slots, groups, [&](std::int64_t group, std::int64_t) {
      T* const sum = sums + group * n;
      std::fill_n(sum, n, T(0));
      const std::int64_t end = std::min(p.rows, (group + 1) * kNormRows);
      for (std::int64_t r = group * kNormRows; r < end; ++r) {
        BackwardRow(x + r * n, gain, dy + r * n, n, dx + r * n, sum);
      }
    });
    T* const total = sums + groups * n;
    S* const dgain = static_cast<S*>(p.dgain);
    fan_out(executor, 1, [&](std::int64_t) {
      std::fill_n(total, n, T(0));
      for (std::int64_t group = 0; group < groups; ++group) AddRow(sums + group * n, total, n);
      ForEachVector<T>(n, [&](auto d, std::int64_t c) HWY_ATTR {
        StoreReal(d, hn::LoadU(d, total + c), dgain + c, /*stream=*/false);
      });
    });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunRmsNorm);
HWY_EXPORT(RunRmsNormBackward);
}  // namespace cpu

std::size_t scratch_bytes(const RmsNorm&, int) { return 0; }

std::size_t scratch_bytes(const RmsNormBackward& p, int) {
  return static_cast<std::size_t>((cpu::norm_groups(p.rows) + 1) *
                                  std::max<std::int64_t>(0, p.columns)) *
         cpu::accumulation_bytes(p.dtype);
}

void run(const RmsNorm& p, const Executor& executor, void*) {
  using namespace cpu;
  check("RmsNorm", {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  HWY_DYNAMIC_DISPATCH(RunRmsNorm)(p, slots_for(p.rows * p.columns, executor.threads), executor);
}

void run(const RmsNormBackward& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check("RmsNormBackward", {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  HWY_DYNAMIC_DISPATCH(RunRmsNormBackward)
  (p, norm_groups(p.rows), slots_for(p.rows * p.columns, executor.threads), executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
