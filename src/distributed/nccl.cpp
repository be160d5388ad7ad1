// With torch for CUDA and NCCL's header.
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "distributed/connection.h"

namespace gateloop::distributed {

bool has_nccl() { return true; }

MakeBackend prepare_nccl(const Launch& launch, std::chrono::milliseconds timeout) {
  if (!torch::cuda::is_available()) {
    throw std::invalid_argument(
        "backend must be gloo or auto, got nccl: this libtorch finds no CUDA device");
  }
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return [launch, options](const c10::intrusive_ptr<c10d::Store>& store) {
    return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, launch.rank, launch.size, options);
  };
}

}  // namespace gateloop::distributed
