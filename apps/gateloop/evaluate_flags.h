#pragma once

/// The flags of `gateloop evaluate`, and what it prints, in one process and in several.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>

#include "corpus_flags.h"
#include "gateloop/corpus.h"
#include "gateloop/runtime.h"
#include "model_flags.h"

namespace gateloop::app {

struct EvaluateFlags {
  ModelFlags model;
  CorpusFlags corpus;
  std::string part = "all";
  std::string mode = "both";
  std::int64_t length = 256;
  std::size_t first = std::numeric_limits<std::size_t>::max();
  int timeout = 600;  ///< seconds
};

/// Returns the command, whose callback is the caller's.
CLI::App* add_evaluate_flags(CLI::App& app, EvaluateFlags& flags);

/// runtime::evaluate() of a text, by one process or by several.
using Reading = std::function<runtime::Score(std::span<const std::uint8_t> text,
                                             const runtime::EvaluateOptions& options)>;

/// Reads the text that `flags` name in their modes and prints the figures, unless `quiet`. Throws
/// UsageError for a part that is too short and for a mode that the model has not.
void print_scores(const EvaluateFlags& flags, const corpus::Corpus& corpus,
                  const model::ModelSpec& spec, const Reading& reading, bool quiet = false);

}  // namespace gateloop::app
