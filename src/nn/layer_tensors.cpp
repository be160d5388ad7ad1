#include "nn/layer_tensors.h"

#include <algorithm>

namespace gateloop::nn {
namespace {

const void* data_of(const torch::Tensor& t) {
  return t.has_storage() ? t.const_data_ptr() : nullptr;
}

/// Inference tensors count no writes.
std::int64_t version_of(const torch::Tensor& t) {
  return t.is_inference() ? 0 : static_cast<std::int64_t>(t._version());
}

}  // namespace

LayerTensors::LayerTensors(const torch::nn::Module& model) {
  for (const auto& item : model.named_modules(/*name_prefix=*/{}, /*include_self=*/false)) {
    const auto& name = item.key();
    const auto& module = *item.value();
    if (const auto* linear = module.as<torch::nn::Linear>()) {
      add(name + ".weight", linear->weight);
      add(name + ".bias", linear->bias);
    } else if (const auto* norm = module.as<torch::nn::LayerNorm>()) {
      add(name + ".weight", norm->weight);
      add(name + ".bias", norm->bias);
    } else if (const auto* embedding = module.as<torch::nn::Embedding>()) {
      add(name + ".weight", embedding->weight);
    } else {
      for (const auto& parameter : module.named_parameters(/*recurse=*/false))
        add(name + "." + parameter.key(), parameters_.emplace_back(parameter.value()));
    }
  }
}

void LayerTensors::add(const std::string& name, const torch::Tensor& tensor) {
  if (tensor.defined())
    entries_.emplace(name, Entry{&tensor, tensor, data_of(tensor), version_of(tensor)});
}

torch::Tensor LayerTensors::find(const std::string& name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? torch::Tensor() : found->second.then;
}

bool LayerTensors::have_changed() const {
  return std::any_of(entries_.begin(), entries_.end(), [](const auto& item) {
    const Entry& entry = item.second;
    return !entry.now->is_same(entry.then) || data_of(*entry.now) != entry.data ||
           version_of(*entry.now) != entry.version;
  });
}

}  // namespace gateloop::nn
