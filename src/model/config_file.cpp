#include "model/config_file.h"

#include <stdexcept>

#include "model/digest.h"
#include "model/file.h"
#include "model/parse_json.h"

namespace gateloop::model {
namespace {

using json_fields::json;
using json_fields::kConfigFormat;

constexpr const char* kConfigFile = "config.json";
// Of a safetensors file's metadata.
constexpr const char* kModelKey = "config";
constexpr const char* kIdKey = "config_id";

}  // namespace

std::string config_id(const ModelOptions& options) {
  Digest digest;
  digest.add(to_json(options));
  return hexadecimal(digest.value());
}

void fail_config(const std::filesystem::path& dir, const std::string& problem) {
  throw std::runtime_error((dir / kConfigFile).string() + ": not a configuration: " + problem);
}

json read_config(const std::filesystem::path& dir, const std::vector<std::string>& required) {
  const std::string text = read_text(dir / kConfigFile);
  json config;
  try {
    config = parse_json<json>(text);
  } catch (const std::exception& error) {
    fail_config(dir, error.what());
  }
  if (!config.is_object()) fail_config(dir, "not a JSON object");
  for (const std::string& key : required) {
    if (!config.contains(key)) fail_config(dir, "no \"" + key + "\" in it");
  }
  const auto format = config.find("format");
  if (format == config.end()) fail_config(dir, "no \"format\" in it");
  if (*format != kConfigFormat) {
    fail_config(dir, "format " + format->dump() + "; this program reads format " +
                         std::to_string(kConfigFormat));
  }
  return config;
}

std::string id_of(const json& config) {
  const auto found = config.find("id");
  return found != config.end() && found->is_string() ? found->get<std::string>() : "";
}

std::vector<std::string> provenance_of(const json& config) {
  std::vector<std::string> objects;
  const auto found = config.find("provenance");
  if (found == config.end() || !found->is_array()) return objects;
  for (const json& object : *found) objects.push_back(object.dump());
  return objects;
}

void add_provenance(const std::filesystem::path& dir, const std::string& object) {
  json config = read_config(dir, {});
  json& objects = config["provenance"];
  if (!objects.is_array()) objects = json::array();
  objects.push_back(json::parse(object));
  save_text(dir / "config.json", config.dump(2) + "\n");
}

std::optional<bool> documents_of(const json& config) {
  const auto training = config.find("training");
  if (training == config.end() || !training->is_object()) return std::nullopt;
  const auto documents = training->find("documents");
  return documents != training->end() && *documents == true;
}

std::map<std::string, std::string> config_metadata(const ModelOptions& options,
                                                   const std::string& id) {
  return {{kModelKey, json::parse(to_json(options)).dump()}, {kIdKey, id}};
}

ModelOptions options_of(const json& config, const std::map<std::string, std::string>& metadata) {
  const auto model = metadata.find(kModelKey);
  const auto id = metadata.find(kIdKey);
  const bool carries = model != metadata.end() && id != metadata.end();
  if (carries && id->second != id_of(config)) return options_from_json(model->second);
  return options_from_json(config.at("model").dump());
}

ModelFiles open_model(const std::filesystem::path& dir, Weights weights) {
  if (!std::filesystem::exists(dir / kConfigFile)) {
    throw std::runtime_error(
        dir.string() +
        ": no model there (no config.json): gateloop train makes one, with this "
        "directory as --out");
  }
  ModelFiles files;
  const bool best = weights == Weights::kBest;
  files.weights = dir / (best ? "model.best.safetensors" : "model.safetensors");
  if (!std::filesystem::exists(files.weights)) {
    throw std::runtime_error(files.weights.string() +
                             ": no such file: training has not yet saved " +
                             (best ? "a best model" : "a model") + " in this directory");
  }
  const json config = read_config(dir, {"model"});
  files.header = read_safetensors_header(files.weights);
  try {
    files.options = options_of(config, files.header.metadata);
    files.spec = resolve(files.options);
  } catch (const std::exception& error) {
    fail_config(dir, error.what());
  }
  if (const std::string problems = stored_problems(files.spec, files.header.tensors);
      !problems.empty())
    throw std::runtime_error(files.weights.string() + ": " + problems);
  return files;
}

}  // namespace gateloop::model
