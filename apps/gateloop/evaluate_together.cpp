// `gateloop evaluate` where a launcher has started several processes.
#include <torch/torch.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "commands.h"
#include "evaluate_flags.h"
#include "gateloop/checkpoint.h"
#include "gateloop/evaluation.h"
#include "gateloop/training.h"
#include "processes.h"

namespace gateloop::app {
namespace {

void evaluate(EvaluateFlags flags, const distributed::Communicator& communicator) {
  if (communicator.size() > 1 && flags.mode != "windowed" &&
      flags.model.format != runtime::Format::kFile)
    throw UsageError(
        "--dtype in several processes needs --mode windowed; for the carried figure "
        "write the model in that type by `gateloop quantize` and evaluate that");
  const auto corpus =
      open_corpus_for(flags.model.directory, flags.corpus, /*quiet=*/!communicator.is_main());
  const std::string expected = communicator.from_main([&] { return corpus.fingerprint(); });
  if (corpus.fingerprint() != expected)
    throw std::runtime_error("--data " + corpus.name() + " is not the text of process 0: " +
                             corpus.fingerprint() + " instead of " + expected);
  if (flags.model.threads == 0)
    flags.model.threads = training::default_threads(communicator.local_size());
  torch::set_num_threads(flags.model.threads);
  auto session = open_byte_session(flags.model);
  const auto modules = [&] {
    return checkpoint::load_model(flags.model.directory, flags.model.weights);
  };
  print_scores(
      flags, corpus, session.model().spec(),
      [&](auto text, const auto& options) {
        return training::evaluate_over_processes(session, modules, text, options, communicator);
      },
      /*quiet=*/!communicator.is_main());
}

}  // namespace

void add_evaluate_command(CLI::App& app) {
  auto flags = std::make_shared<EvaluateFlags>();
  add_evaluate_flags(app, *flags)->callback([flags] {
    work_together("gloo", flags->timeout, [&](const distributed::Communicator& communicator) {
      evaluate(*flags, communicator);
    });
  });
}

}  // namespace gateloop::app
