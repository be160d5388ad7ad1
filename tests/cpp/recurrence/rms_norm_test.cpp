#include <utility>

#include "recurrence/cpu/target.h"
#include "rms_norm_case.h"

namespace gateloop::testing::rms_norm {
namespace {

/// Around vectors of 1 to 64 lanes, and around groups of rows.
constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {
    {1, 1}, {3, 0}, {0, 5}, {5, 7}, {3, 64}, {4, 65}, {128, 3}, {129, 31}, {300, 129}};

TEST(RmsNorm, AndItsAdjointEqualTheDefinition) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype : kRealDTypes) {
      for (const auto& [rows, columns] : kShapes) {
        SCOPED_TRACE(target);
        check({.dtype = dtype, .rows = rows, .columns = columns, .threads = 2});
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(RmsNorm, IsTheSameForAnyNumberOfThreads) {
  for (const DType dtype : kRealDTypes) {
    Case c{.dtype = dtype, .rows = 700, .columns = 129};
    const Outcome one = run(c);
    c.threads = 3;
    expect_same(one, run(c), name(dtype));
  }
}

TEST(RmsNorm, RefusesComplexNumbersAndNegativeSizes) {
  expect_refusals<recurrence::RmsNorm>();
  expect_refusals<recurrence::RmsNormBackward>();
}

}  // namespace
}  // namespace gateloop::testing::rms_norm
