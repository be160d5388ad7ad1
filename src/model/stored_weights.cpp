// Which dtypes a model's weights may be stored in.
#include <map>

#include "model/safetensors.h"

namespace gateloop::model {

std::string scale_name(const std::string& matrix) { return matrix + ".scale"; }

std::string stored_problems(const ModelSpec& spec, const std::vector<TensorEntry>& tensors) {
  std::map<std::string, const TensorEntry*> by_name;
  for (const TensorEntry& entry : tensors) by_name.emplace(entry.name, &entry);
  std::map<std::string, Role> roles;
  for (const Weight& weight : weight_table(spec)) roles.emplace(weight.name, weight.role);

  std::string problems;
  const auto note = [&](const std::string& problem) {
    problems += (problems.empty() ? "" : "; ") + problem;
  };
  std::map<std::string, const TensorEntry*> unclaimed = by_name;
  for (const auto& [name, role] : roles) {
    const auto found = by_name.find(name);
    if (found == by_name.end()) continue;
    const TensorEntry& entry = *found->second;
    const bool is_matrix = role == Role::kMatrix || role == Role::kEmbedding;
    if (entry.dtype == "I8" && is_matrix && entry.shape.size() == 2) {
      const auto scale = by_name.find(scale_name(name));
      const bool fits = scale != by_name.end() && scale->second->dtype == "F32" &&
                        scale->second->shape == std::vector{entry.shape[0]};
      if (!fits)
        note(name + " is I8 and needs " + scale_name(name) + ", F32 (" +
             std::to_string(entry.shape[0]) + ")");
      unclaimed.erase(scale_name(name));
    } else if (entry.dtype != "F64" && entry.dtype != "F32" && entry.dtype != "F16" &&
               entry.dtype != "BF16") {
      note(name + " is " + entry.dtype + ", " +
           (is_matrix ? "not F64, F32, F16, BF16 or I8" : "not F64, F32, F16 or BF16"));
    }
  }
  std::vector<NamedShape> given;
  given.reserve(unclaimed.size());
  for (const auto& [name, entry] : unclaimed) given.push_back({name, entry->shape});
  const std::string shapes = weight_problems(spec, given);
  if (shapes.empty()) return problems;
  return problems.empty() ? shapes : shapes + "; " + problems;
}

}  // namespace gateloop::model
