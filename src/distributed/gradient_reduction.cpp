#include "distributed/gradient_reduction.h"

#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "distributed/connection.h"

namespace gateloop::distributed {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;
using Future = c10::intrusive_ptr<c10::ivalue::Future>;

/// The sum over processes of a bucket; Reducer's own would be the mean.
class SumHook : public c10d::CppCommHookInterface<Group> {
 public:
  SumHook(const Group& group, torch::ScalarType sent) : CppCommHookInterface(group), sent_(sent) {}

  Future runHook(c10d::GradBucket& bucket) override {
    const torch::Tensor& gradients = bucket.getBufferRef();  // (n) of the bucket's gradients
    std::vector<torch::Tensor> message = {gradients.to(sent_)};
    Future sum = state_->allreduce(message)->getFuture();
    if (gradients.scalar_type() == sent_) return sum;
    const auto widen = [gradients](c10::ivalue::Future& arrived) {
      gradients.copy_(c10d::detail::parseCppCommHookResult(arrived.value()));
      return c10::IValue(gradients);
    };
    return sum->then(widen, c10::TensorType::get());
  }

 private:
  torch::ScalarType sent_;
};

/// `parameters` that `backward` reaches, in the order in which their gradients are ready.
std::vector<torch::Tensor> in_order_of_gradients(std::vector<torch::Tensor> parameters,
                                                 const std::function<void()>& backward) {
  std::vector<torch::Tensor> order;
  std::vector<unsigned> hooks;
  // Constants of a model, such as rotary frequencies, take no hook.
  std::erase_if(parameters, [](const torch::Tensor& t) { return !t.requires_grad(); });
  hooks.reserve(parameters.size());
  for (const torch::Tensor& parameter : parameters) {
    hooks.push_back(parameter.register_hook(
        [&order, parameter](torch::Tensor) { order.push_back(parameter); }));
  }
  backward();
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].remove_hook(hooks[i]);
    parameters[i].mutable_grad().reset();
  }
  return order;
}

}  // namespace

GradientReduction::GradientReduction(const Communicator& communicator,
                                     const std::vector<torch::Tensor>& parameters,
                                     torch::ScalarType sent,
                                     const std::function<void()>& backward) {
  if (communicator.size() == 1) return;
  const Group group = communicator.connection_->group;
  const std::vector<torch::Tensor> order = in_order_of_gradients(parameters, backward);
  // The first bucket is small, so that the first message leaves early.
  const std::vector<std::size_t> limits = {c10d::kDefaultFirstBucketBytes,
                                           c10d::kDefaultBucketBytesCap};
  const auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(order, limits));
  reducer_ = std::make_unique<c10d::Reducer>(
      order, buckets, group, std::vector<bool>(order.size(), false), c10d::kDefaultBucketBytesCap,
      /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true,
      /*param_names=*/std::unordered_map<std::size_t, std::string>(),
      c10d::kDefaultFirstBucketBytes, /*skip_all_reduce_unused_params=*/false,
      /*use_python_reducer=*/false, /*bucket_bytes_cap_list=*/std::vector<std::int64_t>());
  reducer_->register_comm_hook(std::make_unique<SumHook>(group, sent));
}

GradientReduction::~GradientReduction() = default;

void GradientReduction::prepare() {
  if (reducer_) reducer_->prepare_for_backward({});
}

// Reducer records the order of every pass until its buckets are laid out anew, which it does once.
// They stay as they are, because the order is that of the first pass.
void GradientReduction::finish() {
  if (reducer_ && reducer_->should_rebuild_buckets()) reducer_->rebuild_buckets();
}

}  // namespace gateloop::distributed
