#include <memory>

#include "commands.h"
#include "evaluate_flags.h"

namespace gateloop::app {
namespace {

void run(const EvaluateFlags& flags) {
  const auto reader = open_byte_reader(flags.model);
  const auto corpus = open_corpus_for(flags.model.directory, flags.corpus);
  print_scores(flags, corpus, reader->spec(), [&](auto text, const auto& options) {
    return runtime::evaluate(*reader, text, options);
  });
}

}  // namespace

void add_evaluate_command(CLI::App& app) {
  auto flags = std::make_shared<EvaluateFlags>();
  add_evaluate_flags(app, *flags)->callback([flags] { run(*flags); });
}

}  // namespace gateloop::app
