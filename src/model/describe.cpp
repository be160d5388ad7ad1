// The description of a model as JSON, for front ends in other languages.
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "gateloop/model.h"
#include "model/json_fields.h"
#include "model/parse_json.h"
#include "model/safetensors.h"

namespace gateloop::model {

using json_fields::json;

namespace {

/// What follows from the fields of a GateLoop layer.
void add_derived(json& layer, const GateLoopSpec& spec) {
  const std::vector<double> bias = initial_transition_bias(spec);
  layer["initial_bias"] = bias.empty() ? json(nullptr) : json(bias);
  layer["transition_channels"] = spec.transition_parts() * spec.transitions();
  layer["state_shape"] = spec.has_max_heads()
                             ? json::array({spec.dim_inner})
                             : json::array({spec.heads, spec.state_keys(), spec.value_channels()});
}

json description_of(const ModelSpec& spec) {
  json description = json::parse(to_json(spec));
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    if (const auto* mixer = std::get_if<GateLoopSpec>(&spec.layers[i].mixer))
      add_derived(description["layers"][i]["derived"], *mixer);
  }
  return description;
}

}  // namespace

std::string describe(const std::string& options) {
  const ModelSpec spec = resolve(options_from_json(options));
  json description = description_of(spec);
  json weights = json::array();
  for (const Weight& weight : weight_table(spec))
    weights.push_back(json::array({weight.name, weight.shape}));
  description["weights"] = std::move(weights);
  return description.dump();
}

std::string describe_layer(const std::string& layer, std::int64_t dim) {
  json options = {{"dim", dim}, {"depth", 1}};
  options["layers"] = json::array({parse_json<json>(layer)});
  return description_of(resolve(options_from_json(options.dump())))["layers"][0].dump();
}

std::string stored_problems(const std::string& options, const std::string& tensors) {
  const ModelSpec spec = resolve(options_from_json(options));
  std::vector<TensorEntry> entries;
  const json given = parse_json<json>(tensors);
  for (const auto& [name, entry] : given.items()) {
    entries.push_back({.name = name,
                       .dtype = entry.at(0).get<std::string>(),
                       .shape = entry.at(1).get<std::vector<std::int64_t>>()});
  }
  return stored_problems(spec, entries);
}

}  // namespace gateloop::model
