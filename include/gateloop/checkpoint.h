#pragma once

/// Reading and writing model directories: config.json beside safetensors files. Every write goes to
/// a temporary file in the same folder, is flushed to the disk and then renamed. After a crash, a
/// kill or with a full disk the previous file is whole.
#include <torch/torch.h>

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "gateloop/nn/transformer.h"

namespace gateloop::checkpoint {

/// A safetensors file: named tensors and string metadata.
struct SafeTensors {
  std::map<std::string, torch::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Throws std::runtime_error naming the path and what is wrong (missing, truncated, bad header,
/// unknown dtype, overlapping offsets, ...).
SafeTensors load_safetensors(const std::filesystem::path& path);
/// Throws std::runtime_error naming the path; the file that was there before stays intact.
void save_safetensors(const std::filesystem::path& path, const SafeTensors& content);

using model::Weights;

/// Parameters by state_dict name, float32 copies on the CPU sharing no memory with the module.
std::map<std::string, torch::Tensor> state_dict(const torch::nn::Module& module);
/// Copies by name; throws std::runtime_error naming every missing, unexpected or misshapen tensor.
void load_state_dict(torch::nn::Module& module,
                     const std::map<std::string, torch::Tensor>& tensors);

/// Makes DIR hold this model, and no best one; what else lies there stays. A crash leaves the
/// former model or this one for load_model(), never a part of each.
void save_model(nn::Transformer transformer, const std::filesystem::path& dir);

/// What explains a model later, as a JSON object: "program" with its version, git "revision" (empty
/// if unknown), "torch", "processor", "command" line and "date" (UTC). Where several processes
/// trained it, also their number, "processes".
std::string provenance(int processes = 1);
/// "provenance" of DIR/config.json: such an object for each process that wrote to the directory,
/// oldest first. Empty in directories of earlier versions.
std::vector<std::string> load_provenance(const std::filesystem::path& dir);

/// DIR/config.json ("model" object) and DIR/model.safetensors or DIR/model.best.safetensors.
nn::Transformer load_model(const std::filesystem::path& dir, Weights weights = Weights::kLatest);

}  // namespace gateloop::checkpoint
