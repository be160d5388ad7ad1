#include "nn/packed_weights.h"

#include <ATen/autocast_mode.h>

#include <utility>

#include "ops/linear.h"

namespace gateloop::nn {
namespace {
thread_local const PackedWeights* in_use = nullptr;

template <typename F>
void for_each_projection(const torch::nn::Module& model, const F& f) {
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (const auto* layer = module->as<torch::nn::Linear>()) f(layer->weight);
  }
}

}  // namespace

PackedWeights::PackedWeights(const torch::nn::Module& model) {
  for_each_projection(model, [this](const torch::Tensor& weight) {
    copies_.emplace(weight.unsafeGetTensorImpl(), ops::packed(weight));
  });
}

void move_to_large_pages(const torch::nn::Module& model) {
  for_each_projection(model, ops::move_to_large_pages);
}

PackedWeights::Use::Use(const PackedWeights* weights) : before_(std::exchange(in_use, weights)) {}

PackedWeights::Use::~Use() { in_use = before_; }

const torch::Tensor& PackedWeights::or_own(const torch::Tensor& weight) {
  if (in_use == nullptr || at::autocast::is_autocast_enabled(at::kCPU)) return weight;
  const auto found = in_use->copies_.find(weight.unsafeGetTensorImpl());
  return found == in_use->copies_.end() ? weight : found->second;
}

}  // namespace gateloop::nn
