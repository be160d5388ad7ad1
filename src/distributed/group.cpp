#include "distributed/group.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

namespace gateloop::distributed {
namespace {

at::Tensor flat_and_real(const at::Tensor& t) {
  return (t.is_complex() ? at::view_as_real(t.resolve_conj()) : t).reshape(-1);
}

}  // namespace

Gathering::Gathering(c10d::ProcessGroup& group, at::TensorList tensors)
    : own_(tensors.vec()), processes_(group.getSize()) {
  std::vector<at::Tensor> parts;
  for (const auto& t : own_) parts.push_back(flat_and_real(t));
  sent_ = at::cat(parts);
  received_ = sent_.new_empty({processes_ * sent_.numel()});
  if (sent_.numel() > 0) work_ = group.all_gather_single(received_, sent_);
}

TensorLists Gathering::wait() {
  if (work_) work_->wait();
  TensorLists all;
  for (const auto& row : received_.view({processes_, sent_.numel()}).unbind()) {
    auto& theirs = all.emplace_back();
    std::int64_t begin = 0;
    for (const auto& t : own_) {
      const std::int64_t numbers = t.numel() * (t.is_complex() ? 2 : 1);
      const at::Tensor part = row.narrow(0, begin, numbers);
      begin += numbers;
      theirs.push_back(t.is_complex() ? at::view_as_complex(part.view({-1, 2})).view(t.sizes())
                                      : part.view(t.sizes()));
    }
  }
  return all;
}

at::Tensor of_last_rank(c10d::ProcessGroup& group, const at::Tensor& tensor) {
  std::vector<at::Tensor> message = {tensor.contiguous()};
  c10d::BroadcastOptions options;
  options.rootRank = group.getSize() - 1;
  if (tensor.numel() > 0) group.broadcast(message, options)->wait();
  return message[0];
}

c10::intrusive_ptr<c10d::ProcessGroup> find_group(const char* op, const std::string& name) {
  try {
    return c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false, op, ": group must be the name of a registered process group, got '",
                      name, "'");
  }
}

}  // namespace gateloop::distributed
