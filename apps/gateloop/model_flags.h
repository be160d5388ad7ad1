#pragma once

/// The flags shared by the subcommands that read a trained model.
#include <CLI/CLI.hpp>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "gateloop/runtime.h"

namespace gateloop::app {

/// The device whose commands need no libtorch.
inline constexpr const char* kCpu = "cpu";

struct ModelFlags {
  std::string directory;
  model::Weights weights = model::Weights::kLatest;
  runtime::Format format = runtime::Format::kFile;
  std::string device = kCpu;
  int threads = 0;  ///< 0: every processor that this process may use
};

/// --checkpoint alone.
void add_directory_flag(CLI::App& command, std::string& directory);
/// --checkpoint and --weights.
void add_checkpoint_flags(CLI::App& command, ModelFlags& flags);
/// The values of --dtype.
const std::map<std::string, runtime::Format>& formats();
/// --device, --dtype and --threads.
void add_compute_flags(CLI::App& command, ModelFlags& flags);

/// --threads alone; 0: every processor that this process may use.
void add_threads_flag(CLI::App& command, int& threads);

/// Throws UsageError where the directory holds no config.json.
void check_directory(const std::string& directory);
/// Whether the model in `directory` was trained with --documents; none where its config.json does
/// not say. Throws as check_directory.
std::optional<bool> trained_on_documents(const std::string& directory);
/// Throws UsageError where the directory holds no such model.
void check_model(const ModelFlags& flags);
/// Beside a model whose tokens are those of a tokenizer instead of bytes.
inline constexpr const char* kTokenizer = "tokenizer.json";
/// The model in its own format, or in that of `flags` on the CPU, for a command that reads or
/// writes bytes. Throws as check_model, and UsageError for a model with a tokenizer or with more
/// than 256 tokens.
runtime::Model open_byte_model(const ModelFlags& flags);
/// The same on the CPU.
runtime::Session open_byte_session(const ModelFlags& flags);
/// The same on the device of `flags`. Each program defines it: that without libtorch is replaced by
/// the other where the device is not the CPU. Throws UsageError for a device that is not there.
std::unique_ptr<runtime::Reader> open_byte_reader(const ModelFlags& flags);

}  // namespace gateloop::app
