#pragma once

/// The flags shared by the subcommands that read a trained model.
#include <CLI/CLI.hpp>
#include <string>

#include "gateloop/runtime.h"

namespace gateloop::app {

struct ModelFlags {
  std::string directory;
  model::Weights weights = model::Weights::kLatest;
  runtime::Format format = runtime::Format::kFile;
  int threads = 0;  ///< 0: every processor that this process may use
};

/// --checkpoint and --weights.
void add_checkpoint_flags(CLI::App& command, ModelFlags& flags);
/// --dtype and --threads.
void add_compute_flags(CLI::App& command, ModelFlags& flags);

/// Throws UsageError where the directory holds no such model.
void check_model(const ModelFlags& flags);
/// A session of the model. Throws as check_model.
runtime::Session open_session(const ModelFlags& flags);

}  // namespace gateloop::app
