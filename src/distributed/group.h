#pragma once

/// A process group and what it gathers.
#include <ATen/ATen.h>

#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace gateloop::distributed {

using TensorLists = std::vector<std::vector<at::Tensor>>;

/// Tensors of all processes, on their way. Waits at its end.
class Gathering {
 public:
  /// Sends `tensors`, the same shapes and one dtype on every process.
  Gathering(c10d::ProcessGroup& group, at::TensorList tensors);

  /// Of each rank its tensors. Called once.
  TensorLists wait();

 private:
  std::vector<at::Tensor> own_;
  std::int64_t processes_;
  at::Tensor sent_, received_;  // flat and real: gloo has no complex numbers
  c10::intrusive_ptr<c10d::Work> work_;
};

/// `tensor` of the last rank; on the others its shape and dtype count alone.
at::Tensor of_last_rank(c10d::ProcessGroup& group, const at::Tensor& tensor);

/// Throws c10::Error naming `op` where no group of this name is registered.
c10::intrusive_ptr<c10d::ProcessGroup> find_group(const char* op, const std::string& name);

}  // namespace gateloop::distributed
