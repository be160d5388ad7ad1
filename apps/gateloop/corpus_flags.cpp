#include "corpus_flags.h"

#include <cstdio>
#include <stdexcept>
#include <utility>

#include "commands.h"
#include "model/parse_json.h"
#include "model_flags.h"

namespace gateloop::app {

corpus::Sources CorpusFlags::sources() const {
  corpus::Sources sources{.paths = {}, .field = field, .documents = documents};
  sources.paths.assign(data.begin(), data.end());
  return sources;
}

std::optional<corpus::Split> CorpusFlags::parts() const {
  if (split.empty()) return std::nullopt;
  return corpus::Split{.train = split[0], .valid = split[1], .test = split[2]};
}

CLI::Option* add_data_flags(CLI::App& command, CorpusFlags& flags, const std::string& data_help) {
  command
      .add_option(
          "--field", flags.field,
          "The data are JSON lines, whose text is this field of each line (a.b: b of a); of "
          "folders .jsonl and .ndjson files are read, packed too")
      ->check([](const std::string& name) { return name.empty() ? "must not be empty" : ""; })
      ->check([](const std::string& name) {
        return model::is_utf8(name) ? "" : "must be UTF-8, as the names of JSON are";
      })
      ->type_name("NAME");
  command.add_flag("--documents", flags.documents,
                   "Each file or JSON line is a document: the state starts anew at each, and byte "
                   "0xFF separates them");
  constexpr int kMostPaths = 1'000'000;
  return command
      .add_option("--data", flags.data,
                  data_help +
                      "; several are read one after another, folders with all text files in them; "
                      ".gz, .bz2, .xz, .zst, .lz4, .lz, .lzma and .Z are unpacked, and .zip, .tar, "
                      ".7z and .rar that hold one file")
      // With extra arguments, or without a bound, CLI11 takes a path "[a, b]" for a list.
      ->expected(1, kMostPaths)
      ->allow_extra_args(false)
      ->check(CLI::ExistingPath)
      ->type_name("PATH...");
}

void add_no_documents_flag(CLI::App& command, bool& no_documents, const std::string& meaning) {
  command
      .add_flag("--no-documents", no_documents,
                meaning + "; without this flag and --documents, as the model was trained")
      ->excludes("--documents");
}

void add_split_flag(CLI::App& command, CorpusFlags& flags) {
  command
      .add_option("--split", flags.split,
                  "Bytes to train, validate and test on, from the text's start "
                  "[90, 5 and 5 per cent]")
      ->delimiter(',')
      ->expected(3)
      ->check(CLI::NonNegativeNumber)
      ->type_name("TRAIN,VALID,TEST");
}

corpus::Corpus open_corpus(corpus::Sources sources, const std::optional<corpus::Split>& split) {
  try {
    return corpus::Corpus(std::move(sources), split);
  } catch (const std::runtime_error& error) {  // the files or the split: either is a flag's value
    throw UsageError(error.what());
  }
}

corpus::Corpus open_corpus_for(const std::string& checkpoint, const CorpusFlags& flags,
                               bool quiet) {
  const auto trained = trained_on_documents(checkpoint);
  if (flags.documents && trained == false && !quiet)
    std::fprintf(stderr,
                 "gateloop: %s was trained without --documents: byte 0xFF between them is new to "
                 "the model\n",
                 checkpoint.c_str());
  auto sources = flags.sources();
  sources.documents = are_apart(flags.documents, flags.no_documents, trained);
  if (sources.documents && !flags.documents && !quiet)
    std::printf("documents apart, as the model was trained (--no-documents: as one text)\n");
  return open_corpus(std::move(sources), flags.parts());
}

void report_left_out(const corpus::Corpus& corpus) {
  const std::string files = corpus.left_out();
  if (!files.empty()) std::fprintf(stderr, "gateloop: left out %s\n", files.c_str());
}

}  // namespace gateloop::app
