#include <torch/version.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/checkpoint.h"
#include "model/config_file.h"
#include "model/file.h"
#include "model/provenance.h"
#include "model/safetensors.h"

namespace gateloop::checkpoint {
namespace {

using model::json_fields::json;

/// Parameters and buffers by name: the keys of a state_dict.
std::vector<std::pair<std::string, torch::Tensor>> named_tensors(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, torch::Tensor>> named;
  for (const auto& item : module.named_parameters()) named.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) named.emplace_back(item.key(), item.value());
  return named;
}

/// Replaces matrices of int8 and their scales, which are of this model, by what they stand for.
void widen_int8(const model::ModelSpec& spec, std::map<std::string, torch::Tensor>& tensors) {
  for (const model::Weight& weight : model::weight_table(spec)) {
    const auto scale = tensors.find(model::scale_name(weight.name));
    if (scale == tensors.end()) continue;
    torch::Tensor& matrix = tensors.at(weight.name);
    matrix = matrix.to(torch::kFloat32) * scale->second.unsqueeze(1);
    tensors.erase(scale);
  }
}

}  // namespace

std::map<std::string, torch::Tensor> state_dict(const torch::nn::Module& module) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& [name, tensor] : named_tensors(module)) {
    const torch::ScalarType type =
        tensor.is_floating_point() ? torch::kFloat32 : tensor.scalar_type();
    tensors[name] =
        tensor.detach().to(torch::kCPU, type, /*non_blocking=*/false, /*copy=*/true).contiguous();
  }
  return tensors;
}

void load_state_dict(torch::nn::Module& module,
                     const std::map<std::string, torch::Tensor>& tensors) {
  const auto named = named_tensors(module);
  std::vector<model::NamedShape> expected, given;
  for (const auto& [name, tensor] : named) expected.push_back({name, tensor.sizes().vec()});
  for (const auto& [name, tensor] : tensors) given.push_back({name, tensor.sizes().vec()});
  const std::string problems = model::weight_problems(expected, given);
  if (!problems.empty()) throw std::runtime_error(problems);
  const torch::NoGradGuard no_grad;
  for (auto [name, tensor] : named) tensor.copy_(tensors.at(name));
}

nn::Transformer load_model(const std::filesystem::path& dir, Weights weights) {
  const model::ModelFiles files = model::open_model(dir, weights);
  nn::Transformer model(files.options);
  try {
    auto tensors = load_safetensors(files.weights).tensors;
    widen_int8(files.spec, tensors);
    load_state_dict(*model, tensors);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(files.weights.string() + ": " + error.what());
  }
  model->eval();
  return model;
}

std::string provenance(int processes) {
  json object = json::parse(model::provenance({{"torch", TORCH_VERSION}}));
  if (processes > 1) object["processes"] = processes;
  return object.dump();
}

std::vector<std::string> load_provenance(const std::filesystem::path& dir) {
  return model::provenance_of(model::read_config(dir, {}));
}

void save_model(nn::Transformer transformer, const std::filesystem::path& dir) {
  const std::string id = model::config_id(transformer->options());
  json config = {{"format", model::json_fields::kConfigFormat},
                 {"id", id},
                 {"model", json::parse(model::to_json(transformer->options()))},
                 {"provenance", json::array({json::parse(provenance())})}};
  std::filesystem::create_directories(dir);
  save_safetensors(dir / "model.safetensors",
                   {state_dict(*transformer), model::config_metadata(transformer->options(), id)});
  model::save_text(dir / "config.json", config.dump(2) + "\n");
  std::filesystem::remove(dir / "model.best.safetensors");  // of another model
}

}  // namespace gateloop::checkpoint
