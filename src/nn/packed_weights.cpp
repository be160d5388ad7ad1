#include "nn/packed_weights.h"

#include <ATen/autocast_mode.h>

#include <utility>

#include "ops/linear.h"

namespace gateloop::nn {
namespace {
thread_local const PackedWeights* in_use = nullptr;
}  // namespace

PackedWeights::PackedWeights(const torch::nn::Module& model) {
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (const auto* layer = module->as<torch::nn::Linear>())
      copies_.emplace(layer->weight.unsafeGetTensorImpl(), ops::packed(layer->weight));
  }
}

PackedWeights::Use::Use(const PackedWeights* weights) : before_(std::exchange(in_use, weights)) {}

PackedWeights::Use::~Use() { in_use = before_; }

const torch::Tensor& PackedWeights::or_own(const torch::Tensor& weight) {
  if (in_use == nullptr || at::autocast::is_autocast_enabled(at::kCPU)) return weight;
  const auto found = in_use->copies_.find(weight.unsafeGetTensorImpl());
  return found == in_use->copies_.end() ? weight : found->second;
}

}  // namespace gateloop::nn
