#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/config_file.h"
#include "gateloop/checkpoint.h"

namespace gateloop::checkpoint {
namespace {

using json_fields::json;

/// Parameters and buffers by name: the keys of a state_dict.
std::vector<std::pair<std::string, torch::Tensor>> named_tensors(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, torch::Tensor>> named;
  for (const auto& item : module.named_parameters()) named.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) named.emplace_back(item.key(), item.value());
  return named;
}

std::string shape_text(const torch::Tensor& tensor) {
  std::ostringstream out;
  out << tensor.sizes();
  return out.str();
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
  std::string problems;
  std::map<std::string, torch::Tensor> unexpected = tensors;
  for (const auto& [name, tensor] : named) {
    const auto found = unexpected.find(name);
    if (found == unexpected.end()) {
      problems += " missing " + name + ";";
      continue;
    }
    if (found->second.sizes() != tensor.sizes()) {
      problems += " " + name + " is " + shape_text(found->second) + ", the model's is " +
                  shape_text(tensor) + ";";
    }
    unexpected.erase(found);
  }
  for (const auto& [name, tensor] : unexpected) {
    problems += " unexpected " + name + " " + shape_text(tensor) + ";";
  }
  if (!problems.empty()) {
    problems.pop_back();
    throw std::runtime_error("these weights are not this model's:" + problems);
  }
  const torch::NoGradGuard no_grad;
  for (auto [name, tensor] : named) tensor.copy_(tensors.at(name));
}

nn::Transformer load_model(const std::filesystem::path& dir, Weights weights) {
  const std::filesystem::path config = dir / "config.json";
  if (!std::filesystem::exists(config)) {
    throw std::runtime_error(dir.string() +
                             ": no model there (no config.json): gateloop train "
                             "--out " +
                             dir.string() + " makes one");
  }
  const std::filesystem::path file =
      dir / (weights == Weights::kBest ? "model.best.safetensors" : "model.safetensors");
  if (!std::filesystem::exists(file)) {
    throw std::runtime_error(file.string() + ": no such file: training has not yet saved " +
                             (weights == Weights::kBest ? "a best model" : "a model") +
                             " in this directory");
  }
  const auto configuration = read_config(dir, {"model"});
  const SafeTensors content = load_safetensors(file);
  nn::TransformerOptions options;
  try {
    options = options_of(configuration, content.metadata);
  } catch (const std::runtime_error& error) {
    fail_config(dir, error.what());
  }
  nn::Transformer model(options);
  try {
    load_state_dict(*model, content.tensors);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(file.string() + ": " + error.what());
  }
  model->eval();
  return model;
}

void save_model(nn::Transformer model, const std::filesystem::path& dir) {
  const std::string id = config_id(model->options());
  json config = {{"format", json_fields::kConfigFormat},
                 {"id", id},
                 {"model", json::parse(to_json(model->options()))},
                 {"provenance", json::array({json::parse(provenance())})}};
  std::filesystem::create_directories(dir);
  save_safetensors(dir / "model.safetensors",
                   {state_dict(*model), config_metadata(model->options(), id)});
  save_text(dir / "config.json", config.dump(2) + "\n");
  std::filesystem::remove(dir / "model.best.safetensors");  // of another model
}

}  // namespace gateloop::checkpoint
