// Puts the bodies of the CUDA kernels under the cases of ragged_test.cpp, in an order that no case
// expects.
#include <optional>

#include "kernels.h"

namespace gateloop::testing::cuda {
namespace {

/// In main(): before it, what the kernels are replaced in may not be initialised.
class AllOnHost : public ::testing::Environment {
  void SetUp() override {
    constexpr Order kOrder{.resident = 6, .newest = 60, .shuffle_threads = true, .seed = 9};
    linear_.emplace(kOrder);
    polar_.emplace(kOrder);
    simple_.emplace(kOrder);
  }
  void TearDown() override {
    linear_.reset();
    polar_.reset();
    simple_.reset();
  }

  std::optional<Kernels<Linear>> linear_;
  std::optional<Kernels<Polar>> polar_;
  std::optional<Kernels<Simple>> simple_;
};
[[maybe_unused]] ::testing::Environment* const kernels =
    ::testing::AddGlobalTestEnvironment(new AllOnHost);

}  // namespace
}  // namespace gateloop::testing::cuda
