// With gloo's headers (Debian's libgloo-dev); its code is inside libtorch.
#include <cstdlib>
#include <sstream>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "distributed/connection.h"

namespace gateloop::distributed {

MakeBackend prepare_gloo(const Launch& launch, std::chrono::milliseconds timeout) {
  using c10d::ProcessGroupGloo;
  auto options = ProcessGroupGloo::Options::create(timeout);
  // As in Python: a list of interfaces, or the address that the host's name has.
  const char* interfaces = std::getenv("GLOO_SOCKET_IFNAME");
  if (interfaces != nullptr && *interfaces != '\0') {
    std::istringstream names(interfaces);
    for (std::string name; std::getline(names, name, ',');) {
      options->devices.push_back(ProcessGroupGloo::createDeviceForInterface(name));
    }
  } else {
    options->devices.push_back(ProcessGroupGloo::createDefaultDevice());
  }
  options->threads = static_cast<int>(2 * options->devices.size());
  return [launch, options](const c10::intrusive_ptr<c10d::Store>& store) {
    return c10::make_intrusive<ProcessGroupGloo>(store, launch.rank, launch.size, options);
  };
}

}  // namespace gateloop::distributed
