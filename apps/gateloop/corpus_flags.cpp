#include "corpus_flags.h"

#include <stdexcept>

#include "commands.h"

namespace gateloop::app {

std::optional<corpus::Split> CorpusFlags::parts() const {
  if (split.empty()) return std::nullopt;
  return corpus::Split{.train = split[0], .valid = split[1], .test = split[2]};
}

CLI::Option* add_corpus_flags(CLI::App& command, CorpusFlags& flags, const std::string& data_help) {
  command
      .add_option("--split", flags.split,
                  "Bytes to train, validate and test on, from the text's start "
                  "[90, 5 and 5 per cent]")
      ->delimiter(',')
      ->expected(3)
      ->check(CLI::NonNegativeNumber)
      ->type_name("TRAIN,VALID,TEST");
  return command
      .add_option("--data", flags.data,
                  data_help +
                      "; .gz, .bz2, .xz, .zst, .lz4, .lz and .Z are unpacked, and .zip, .tar, .7z "
                      "and .rar that hold one file")
      ->check(CLI::ExistingFile)
      ->type_name("FILE");
}

corpus::Corpus open_corpus(const std::string& data, const std::optional<corpus::Split>& split) {
  try {
    return corpus::Corpus(data, split);
  } catch (const std::runtime_error& error) {  // the file or the split: either is a flag's value
    throw UsageError(error.what());
  }
}

}  // namespace gateloop::app
