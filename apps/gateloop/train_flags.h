#pragma once

/// The flags of `gateloop train`, and the configuration that they give.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "corpus_flags.h"
#include "gateloop/training.h"

namespace gateloop::app {

/// Flags that override the preset's fields, each only if it is given.
class Overrides;

struct TrainFlags {
  CorpusFlags corpus;
  std::string preset = "quick";
  std::string out;
  std::int64_t steps = 0;
  double minutes = 0;
  std::string plan;
  std::string simple_gate_loop;  ///< "every", "none", or empty: as the preset
  std::uint64_t seed = 0;
  bool resume = false;
  bool overwrite = false;
  std::string backend = "auto";
  int timeout = 600;  ///< seconds
  CLI::Option* preset_given = nullptr;
  CLI::Option* steps_given = nullptr;
  CLI::Option* minutes_given = nullptr;
  CLI::Option* seed_given = nullptr;
  CLI::Option* mixer_given = nullptr;
  CLI::Option* layers_given = nullptr;
  CLI::Option* gate_given = nullptr;
  CLI::Option* normalize_input_given = nullptr;
  CLI::Option* transition_bias_given = nullptr;
  std::shared_ptr<Overrides> overrides;

  std::filesystem::path dir() const { return out.empty() ? "runs/" + preset : out; }
};

void add_train_flags(CLI::App& command, TrainFlags& flags);

/// Sets in `config` the fields whose flags were given.
void apply_overrides(const TrainFlags& flags, training::RunConfig& config);

/// The preset, or what a run that is resumed was begun with; then the flags that were given.
training::RunConfig configure(const TrainFlags& flags);

}  // namespace gateloop::app
