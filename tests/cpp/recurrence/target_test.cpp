#include "recurrence/cpu/target.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace gateloop::recurrence::cpu {
namespace {

TEST(Target, TheBestIsChosenAndEachCanBeForced) {
  const auto names = targets();
  ASSERT_FALSE(names.empty());
  force_target("");
  EXPECT_EQ(active_target(), names.front());
  for (const std::string& name : names) {
    force_target(name);
    EXPECT_EQ(active_target(), name);
  }
  force_target("");
  EXPECT_EQ(active_target(), names.front());
}

TEST(Target, TheFallbackIsCompiledIn) {
  const auto names = targets();
  EXPECT_TRUE(std::ranges::any_of(names, [](const std::string& name) {
    return name == "SCALAR" || name == "EMU128" || name == "NEON";
  }));
}

TEST(Target, UnknownNamesAreRefused) {
  EXPECT_THROW(force_target("AVX9"), std::invalid_argument);
  force_target("");
}

}  // namespace
}  // namespace gateloop::recurrence::cpu
