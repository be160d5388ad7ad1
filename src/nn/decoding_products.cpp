#include "nn/decoding_products.h"

#include <ATen/autocast_mode.h>

#include <utility>

#include "ops/linear.h"

namespace gateloop::nn {
namespace {
thread_local const DecodingProducts* innermost = nullptr;

template <typename F>
void for_each_projection(const torch::nn::Module& model, const F& f) {
  for (const auto& module : model.modules(/*include_self=*/false)) {
    if (const auto* layer = module->as<torch::nn::Linear>()) f(layer->weight);
  }
}

}  // namespace

void DecodingProducts::pack(const torch::nn::Module& model) {
  for_each_projection(model, [this](const torch::Tensor& weight) {
    packed_.emplace(weight.unsafeGetTensorImpl(), ops::packed(weight));
  });
}

torch::Tensor DecodingProducts::multiply(const torch::nn::LinearImpl& layer,
                                         const torch::Tensor& x) const {
  const bool alone = x.size(0) == 1 || at::autocast::is_autocast_enabled(at::kCPU);
  const auto found = alone ? packed_.end() : packed_.find(layer.weight.unsafeGetTensorImpl());
  return ops::linear(x, found == packed_.end() ? layer.weight : found->second, layer.bias);
}

DecodingProducts::Scope::Scope(const DecodingProducts& products)
    : before_(std::exchange(innermost, &products)) {}

DecodingProducts::Scope::~Scope() { innermost = before_; }

const DecodingProducts* DecodingProducts::in_use() { return innermost; }

void move_to_large_pages(const torch::nn::Module& model) {
  for_each_projection(model, ops::move_to_large_pages);
}

}  // namespace gateloop::nn
