// With torch for CUDA and NCCL's header.
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "distributed/connection.h"

namespace gateloop::distributed {

bool has_nccl() { return true; }

Backend make_nccl(const c10::intrusive_ptr<c10d::Store>& store, const Launch& launch,
                  std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, launch.rank, launch.size, options);
}

}  // namespace gateloop::distributed
