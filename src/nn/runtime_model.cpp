#include "gateloop/nn/runtime_model.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "model/safetensors.h"
#include "ops/tensor_model.h"

namespace gateloop::nn {
namespace {

/// In the memory of `model` where it is float32 there, at an address that a float may have.
torch::Tensor floats_of(const runtime::StoredWeight& weight, const runtime::Model& model) {
  const auto type = ops::scalar_type_of(weight.dtype);
  if (type == torch::kFloat32 &&
      reinterpret_cast<std::uintptr_t>(weight.data) % sizeof(float) == 0) {
    // from_blob takes memory to write to; nothing writes to parameters without gradients.
    return torch::from_blob(
        const_cast<void*>(weight.data), weight.shape, [model](void*) {}, type);
  }
  torch::Tensor values = torch::empty(weight.shape, type);
  std::memcpy(values.mutable_data_ptr(), weight.data, values.nbytes());
  return values.to(torch::kFloat32);
}

}  // namespace

runtime::Model runtime_model(const Transformer& transformer) {
  const auto parameters = transformer->named_parameters();
  std::vector<std::string> names;
  std::vector<torch::Tensor> tensors;
  for (const model::Weight& weight : model::weight_table(transformer->spec())) {
    names.push_back(weight.name);
    tensors.push_back(parameters[weight.name].detach().to(torch::kCPU));
  }
  return ops::model_of(transformer->spec(), names, tensors);
}

Transformer modules_of(const runtime::Model& saved) {
  if (!saved.options())
    throw std::invalid_argument("modules_of: model must be opened from a directory, not in memory");
  std::map<std::string, runtime::StoredWeight> stored;
  for (const auto& weight : saved.weights()) stored.emplace(weight.name, weight);
  Transformer transformer(*saved.options());
  for (auto& item : transformer->named_parameters()) {
    torch::Tensor values = floats_of(stored.at(item.key()), saved);
    const auto scales = stored.find(model::scale_name(item.key()));
    if (scales != stored.end()) values = values * floats_of(scales->second, saved).unsqueeze(1);
    item.value().requires_grad_(false);
    item.value().set_data(values);
  }
  transformer->eval();
  return transformer;
}

}  // namespace gateloop::nn
