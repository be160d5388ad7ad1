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
  std::vector<std::string> data;
  std::string field;
  bool documents = false;
  bool no_documents = false;
  std::vector<std::int64_t> split;

  corpus::Sources sources() const;
  std::optional<corpus::Split> parts() const;
};

/// --data, whose help is `data_help` and what can be read, --field and --documents. Returns --data.
CLI::Option* add_data_flags(CLI::App& command, CorpusFlags& flags, const std::string& data_help);
/// --no-documents, beside --documents, for commands of trained models: without either of them
/// documents are apart where they were in the model's training. `meaning` is its help.
void add_no_documents_flag(CLI::App& command, bool& no_documents, const std::string& meaning);
void add_split_flag(CLI::App& command, CorpusFlags& flags);

/// Whether documents are apart: by these two flags, else as in the model's training. `trained`:
/// whether they were apart there; nullopt: not recorded, then they are not apart.
inline bool are_apart(bool documents, bool no_documents, std::optional<bool> trained) {
  return documents || (!no_documents && trained.value_or(false));
}

/// Throws UsageError where the text or the split does not fit.
corpus::Corpus open_corpus(corpus::Sources sources,
                           const std::optional<corpus::Split>& split = std::nullopt);
/// The text that `flags` name, for a trained model: documents are apart as add_no_documents_flag()
/// says. Prints that they are unless `quiet`. Throws UsageError also where there is no model.
corpus::Corpus open_corpus_for(const std::string& checkpoint, const CorpusFlags& flags,
                               bool quiet = false);
/// Says on standard error which files of folders were left out.
void report_left_out(const corpus::Corpus& corpus);

}  // namespace gateloop::app
