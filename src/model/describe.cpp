// The description of a model as JSON, for front ends in other languages.
#include <stdexcept>
#include <string>
#include <vector>

#include "gateloop/model.h"
#include "model/json_fields.h"
#include "model/parse_json.h"

namespace gateloop::model {

using json_fields::json;

std::string describe(const std::string& options) {
  const ModelSpec spec = resolve(options_from_json(options));
  json description = json::parse(to_json(spec));
  json weights = json::array();
  for (const Weight& weight : weight_table(spec))
    weights.push_back(json::array({weight.name, weight.shape}));
  description["weights"] = std::move(weights);
  return description.dump();
}

std::string weight_problems(const std::string& options, const std::string& shapes) {
  const ModelSpec spec = resolve(options_from_json(options));
  std::vector<NamedShape> given;
  const json tensors = parse_json<json>(shapes);
  for (const auto& [name, shape] : tensors.items())
    given.push_back({name, shape.get<std::vector<std::int64_t>>()});
  return weight_problems(spec, given);
}

}  // namespace gateloop::model
