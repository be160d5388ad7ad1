#include "gateloop/nn/runtime_model.h"

#include <string>
#include <vector>

#include "ops/tensor_model.h"

namespace gateloop::nn {

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

}  // namespace gateloop::nn
