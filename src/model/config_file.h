#pragma once

/// config.json: {"format": 1, "id": ..., "model": {...}, "training": {...}, "provenance": [...]}.
///
/// A safetensors file carries a copy of "model", and the "id" of the config.json that it belongs
/// to. Where the two ids differ, writing was interrupted between the two files, and the copy holds.
/// So one rename, that of the weights, replaces a whole model.
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gateloop/model.h"
#include "model/json_fields.h"
#include "model/safetensors.h"

namespace gateloop::model {

/// The id of the config.json of such a model: a digest of its options, so that two runs alike write
/// the same bytes.
std::string config_id(const ModelOptions& options);

/// DIR/config.json: an object of this format with the members `required`. Throws
/// std::runtime_error naming the file and what is wrong.
json_fields::json read_config(const std::filesystem::path& dir,
                              const std::vector<std::string>& required);
/// Throws std::runtime_error naming the file: it holds no such configuration, for the reason given.
[[noreturn]] void fail_config(const std::filesystem::path& dir, const std::string& problem);

/// "id" of a configuration; empty in those of earlier versions.
std::string id_of(const json_fields::json& config);
/// "provenance" of a configuration: JSON objects, one for each process that wrote to the directory.
std::vector<std::string> provenance_of(const json_fields::json& config);
/// One object more in DIR/config.json.
void add_provenance(const std::filesystem::path& dir, const std::string& object);

/// Whether the training that a configuration describes had documents apart; nothing where it
/// describes none.
std::optional<bool> documents_of(const json_fields::json& config);

/// What a safetensors file carries of the configuration with this id.
std::map<std::string, std::string> config_metadata(const ModelOptions& options,
                                                   const std::string& id);
/// The options of the weights that carry `metadata`, beside the configuration.
ModelOptions options_of(const json_fields::json& config,
                        const std::map<std::string, std::string>& metadata);

/// A model in a directory: config.json, and model.safetensors or model.best.safetensors.
struct ModelFiles {
  ModelOptions options;
  ModelSpec spec;
  std::filesystem::path weights;
  SafeTensorsHeader header;
};
/// Throws std::runtime_error naming the file that is not there or what is wrong with it. Also names
/// every weight that is missing, unexpected or misshapen.
ModelFiles open_model(const std::filesystem::path& dir, Weights weights);

}  // namespace gateloop::model
