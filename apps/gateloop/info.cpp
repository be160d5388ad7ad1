#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "model/config_file.h"
#include "model/number_text.h"
#include "model_flags.h"
#include "output.h"

namespace gateloop::app {
namespace {

using model::grouped;

/// The module of a parameter, with all layers under one name:
/// layers.3.0.fn.to_a.0.bias -> layers.*.0.fn.to_a.0
std::string owner(const std::string& parameter) {
  auto name = parameter.substr(0, parameter.rfind('.'));
  const std::string prefix = "layers.";
  if (name.starts_with(prefix)) name = prefix + "*" + name.substr(name.find('.', prefix.size()));
  return name;
}

void print_parameters(const model::ModelSpec& spec) {
  std::vector<std::pair<std::string, std::int64_t>> modules;  // in the model's order
  std::int64_t total = 0;
  for (const auto& weight : model::weight_table(spec)) {
    const auto name = owner(weight.name);
    auto found = modules.begin();
    while (found != modules.end() && found->first != name) ++found;
    if (found == modules.end()) found = modules.insert(found, {name, 0});
    found->second += weight.numel();
    total += weight.numel();
  }
  std::printf("\n%-32s %15s\n", "module (* = all layers)", "parameters");
  for (const auto& [name, count] : modules)
    std::printf("%-32s %15s\n", name.c_str(), grouped(count).c_str());
  std::printf("%-32s %15s\n", "total", grouped(total).c_str());
}

void print_state(const model::ModelSpec& spec) {
  const auto state = model::state_size(spec);
  if (state.per_token == 0)
    std::printf("\nstate per sequence: %s bytes, however long the text\n",
                grouped(state.fixed).c_str());
  else
    std::printf("\nstate per sequence: %s bytes and %s more for every token (key/value cache)\n",
                grouped(state.fixed).c_str(), grouped(state.per_token).c_str());
}

void print_files(const std::filesystem::path& directory) {
  std::printf("\nfiles\n");
  for (const auto* name : {"model.safetensors", "model.best.safetensors"}) {
    const auto path = directory / name;
    if (!std::filesystem::exists(path)) continue;
    std::printf("  %s: %s bytes", name,
                grouped(static_cast<std::int64_t>(std::filesystem::file_size(path))).c_str());
    for (const auto& [key, value] : model::read_safetensors_header(path).metadata)
      if (!key.starts_with("config")) std::printf(", %s %s", key.c_str(), value.c_str());
    std::printf("\n");
  }
}

void print_provenance(const std::filesystem::path& directory) {
  std::printf("\nprovenance\n");
  for (const auto& object : model::provenance_of(model::read_config(directory, {})))
    std::printf("  %s\n", object.c_str());
}

void run(const ModelFlags& flags) {
  check_model(flags);
  const auto files = model::open_model(flags.directory, flags.weights);
  std::printf("model %s\n", model::to_json(files.options).c_str());
  print_parameters(files.spec);
  print_state(files.spec);
  print_files(flags.directory);
  print_provenance(flags.directory);
  flush_output();
}

}  // namespace

void add_info_command(CLI::App& app) {
  auto flags = std::make_shared<ModelFlags>();
  auto* command = app.add_subcommand(
      "info", "Show a model's configuration, parameters, state and saved weights.");
  add_checkpoint_flags(*command, *flags);
  command->callback([flags] { run(*flags); });
}

}  // namespace gateloop::app
