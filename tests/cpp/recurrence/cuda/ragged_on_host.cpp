// Puts the bodies of the CUDA kernels under the cases of ragged_test.cpp, in an order that no case
// expects.
#include "kernels.h"

namespace gateloop::testing::cuda {
namespace {

class AllOnHost : public ::testing::Environment {
  static constexpr Order kOrder{.resident = 6, .newest = 60, .shuffle_threads = true, .seed = 9};
  Kernels<Linear> linear_{kOrder};
  Kernels<Polar> polar_{kOrder};
  Kernels<Simple> simple_{kOrder};
};
[[maybe_unused]] ::testing::Environment* const kernels =
    ::testing::AddGlobalTestEnvironment(new AllOnHost);

}  // namespace
}  // namespace gateloop::testing::cuda
