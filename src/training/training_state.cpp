#include "training/training_state.h"

#include <charconv>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "gateloop/checkpoint.h"
#include "model/number_text.h"
#include "training/plan.h"

namespace gateloop::training {
namespace {

constexpr std::string_view kModelPrefix = "model.";

template <typename Number>
Number from_text(const std::map<std::string, std::string>& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  Number number{};
  if (found == metadata.end()) throw std::runtime_error("no \"" + key + "\" in its metadata");
  const char* end = found->second.data() + found->second.size();
  const auto [stop, error] = std::from_chars(found->second.data(), end, number);
  if (error != std::errc() || stop != end) {
    throw std::runtime_error("\"" + key + "\" in its metadata is not a number: " + found->second);
  }
  return number;
}

std::map<std::string, std::string> metadata_of(const Position& position) {
  return {{"step", model::number_text(position.step)},
          {"elapsed_seconds", model::number_text(position.elapsed_seconds)},
          {"best_bits_per_byte", model::number_text(position.best_bits_per_byte)},
          {"best_step", model::number_text(position.best_step)},
          {"plan", plan_to_json(position.plan)},
          {"last_line", position.last_line}};
}

Position position_of(const std::map<std::string, std::string>& metadata) {
  Position position;
  position.step = from_text<std::int64_t>(metadata, "step");
  position.elapsed_seconds = from_text<double>(metadata, "elapsed_seconds");
  position.best_bits_per_byte = from_text<double>(metadata, "best_bits_per_byte");
  position.best_step = from_text<std::int64_t>(metadata, "best_step");
  if (position.step < 0 || position.best_step < 0 || !(position.elapsed_seconds >= 0)) {
    throw std::runtime_error("\"step\", \"best_step\" or \"elapsed_seconds\" is below 0");
  }
  // Absent in earlier states.
  if (const auto plan = metadata.find("plan"); plan != metadata.end())
    position.plan = plan_from_json(plan->second);
  if (const auto line = metadata.find("last_line"); line != metadata.end()) {
    position.last_line = line->second;
    const auto object = nlohmann::json::parse(position.last_line, nullptr, false);
    const bool fits =
        position.last_line.empty() ||
        (object.is_object() && object.value("step", nlohmann::json()) == position.step);
    if (!fits)
      throw std::runtime_error("\"last_line\" in its metadata is not the line of its step");
  }
  return position;
}

/// What a state file holds, checked; its parameters are in `model`.
checkpoint::SafeTensors load(const std::filesystem::path& path, torch::nn::Module& model,
                             const Optimizer& optimizer) {
  checkpoint::SafeTensors content = checkpoint::load_safetensors(path);
  try {
    position_of(content.metadata);
    std::map<std::string, torch::Tensor> weights;
    for (const auto& [name, tensor] : content.tensors) {
      if (name.starts_with(kModelPrefix)) weights[name.substr(kModelPrefix.size())] = tensor;
    }
    checkpoint::load_state_dict(model, weights);
    optimizer.check(content.tensors);
    return content;
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path.string() + ": cannot resume from it: " + error.what());
  }
}

}  // namespace

void save_state(const std::filesystem::path& path, const torch::nn::Module& model,
                std::map<std::string, torch::Tensor> moments, const Position& position) {
  checkpoint::SafeTensors content{std::move(moments), metadata_of(position)};
  for (auto& [name, tensor] : checkpoint::state_dict(model)) {
    content.tensors[std::string(kModelPrefix) + name] = tensor;
  }
  checkpoint::save_safetensors(path, content);
}

Position take_up(const std::filesystem::path& path, torch::nn::Module& model, Optimizer& optimizer,
                 const distributed::Communicator& communicator) {
  checkpoint::SafeTensors content;
  const std::string metadata = communicator.from_main([&] {
    if (!std::filesystem::exists(path)) return std::string();
    content = load(path, model, optimizer);
    return nlohmann::json(content.metadata).dump();
  });
  communicator.broadcast(model.parameters());
  if (metadata.empty()) return {};
  const auto position =
      position_of(nlohmann::json::parse(metadata).get<std::map<std::string, std::string>>());
  optimizer.load(content.tensors, position.step);
  return position;
}

}  // namespace gateloop::training
