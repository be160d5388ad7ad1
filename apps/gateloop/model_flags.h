#pragma once

/// The flags shared by the subcommands that read a trained model.
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <string>

#include "gateloop/checkpoint.h"

namespace gateloop::app {

struct ModelFlags {
  std::string directory;
  checkpoint::Weights weights = checkpoint::Weights::kLatest;
  torch::ScalarType dtype = torch::kFloat32;
  int threads = 0;  ///< 0: training::default_threads()
};

/// --checkpoint and --weights.
void add_checkpoint_flags(CLI::App& command, ModelFlags& flags);
/// --dtype (`dtype_help` says what it does here) and --threads.
void add_compute_flags(CLI::App& command, ModelFlags& flags, const std::string& dtype_help);

/// Sets the threads and reads the model, in float32 and eval mode. Throws UsageError where the
/// directory holds no such model.
nn::Transformer load_model(const ModelFlags& flags);

}  // namespace gateloop::app
