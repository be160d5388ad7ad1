#include <stdexcept>

#include "distributed/connection.h"

namespace gateloop::distributed {

bool has_nccl() { return false; }

Backend make_nccl(const c10::intrusive_ptr<c10d::Store>&, const Launch&,
                  std::chrono::milliseconds) {
  throw std::invalid_argument(
      "backend must be gloo or auto, got nccl: this build has no NCCL (a torch for CUDA and "
      "nccl.h)");
}

}  // namespace gateloop::distributed
