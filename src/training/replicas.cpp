#include "training/replicas.h"

#include "ops/kernels/executor.h"

namespace gateloop::training {

Replicas::Replicas(const nn::Transformer& model, std::int64_t count) : models_({model}) {
  while (this->count() < count) {
    nn::Transformer copy(model->options());
    copy->set_checkpoint_blocks(model->checkpoint_blocks());
    const auto shared = model->named_parameters();
    for (auto& item : copy->named_parameters()) {
      const torch::Tensor& weight = shared[item.key()];
      item.value().set_data(weight.detach());
      item.value().requires_grad_(weight.requires_grad());
    }
    models_.push_back(std::move(copy));
  }
}

void Replicas::for_each(std::int64_t n,
                        const std::function<void(nn::Transformer&, std::int64_t)>& work) {
  if (n == 1) return work(models_.front(), 0);
  // Inside of its region torch's operators and its backward pass keep to the thread that calls.
  ops::torch_threads().parallel_for(
      n, [&](std::int64_t i) { work(models_[static_cast<std::size_t>(i)], i); });
}

void Replicas::gather_gradients() {
  const torch::NoGradGuard no_grad;
  const std::vector<torch::Tensor> totals = models_.front()->parameters();
  for (auto copy = models_.begin() + 1; copy != models_.end(); ++copy) {
    const std::vector<torch::Tensor> parts = (*copy)->parameters();
    for (std::size_t i = 0; i < parts.size(); ++i) {
      torch::Tensor& part = parts[i].mutable_grad();
      if (part.defined()) totals[i].grad().add_(part);
      part.reset();
    }
  }
}

}  // namespace gateloop::training
