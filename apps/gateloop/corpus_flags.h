#pragma once

/// The flags shared by the subcommands that read a text.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateloop/corpus.h"

namespace gateloop::app {

struct CorpusFlags {
  std::string data;
  std::vector<std::int64_t> split;

  std::optional<corpus::Split> parts() const;
};

/// --data, whose help is `data_help` and what can be read, and --split. Returns --data.
CLI::Option* add_corpus_flags(CLI::App& command, CorpusFlags& flags, const std::string& data_help);

/// Throws UsageError where the file or the split does not fit.
corpus::Corpus open_corpus(const std::string& data, const std::optional<corpus::Split>& split);

}  // namespace gateloop::app
