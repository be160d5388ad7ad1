#include <stdexcept>

#include "distributed/connection.h"

namespace gateloop::distributed {

bool has_nccl() { return false; }

MakeBackend prepare_nccl(const Launch&, std::chrono::milliseconds) {
  throw std::invalid_argument(
      "backend must be gloo or auto, got nccl: this build has no NCCL (a torch for CUDA and "
      "nccl.h)");
}

}  // namespace gateloop::distributed
