// Of src/distributed/no_gloo.cpp, which stands in for gloo.cpp where the headers are missing.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "distributed/connection.h"

namespace gateloop::distributed {
namespace {

TEST(WithoutGloo, NamesTheProcessesAndThePackage) {
  Launch launch;
  launch.size = 3;
  try {
    prepare_gloo(launch, std::chrono::seconds(1));
    FAIL() << "nothing was thrown";
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()),
              "this build has one process only, the launcher started 3: gloo's headers were not "
              "there when it was built (Debian: libgloo-dev; scripts/setup)");
  }
}

}  // namespace
}  // namespace gateloop::distributed
