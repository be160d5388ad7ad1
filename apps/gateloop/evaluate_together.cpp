// `gateloop evaluate` where a launcher has started several processes, or on another device than the
// CPU.
#include <torch/torch.h>

#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocator.h"
#include "commands.h"
#include "device_reader.h"
#include "evaluate_flags.h"
#include "gateloop/evaluation.h"
#include "gateloop/training.h"
#include "processes.h"

namespace gateloop::app {
namespace {

struct Field {
  std::string name;
  std::string value;  // a line
};

/// Throws std::runtime_error in all processes where a field is not that of process 0, and names the
/// first such field.
void check_same(const std::vector<Field>& fields, const distributed::Communicator& communicator) {
  std::istringstream of_main(communicator.from_main([&] {
    std::string lines;
    for (const Field& field : fields) lines += field.value + "\n";
    return lines;
  }));
  for (const Field& field : fields) {
    std::string expected;
    std::getline(of_main, expected);
    if (field.value != expected)
      throw std::runtime_error(field.name + " must be the same in all processes: " + field.value +
                               " in process " + std::to_string(communicator.rank()) + ", " +
                               expected + " in process 0");
  }
  communicator.gather({0});  // where one has thrown, this throws in the others
}

std::string name_of(runtime::Format format) {
  for (const auto& [name, known] : formats()) {
    if (known == format) return name;
  }
  return "as stored";
}

std::vector<Field> flag_fields(const EvaluateFlags& flags) {
  const bool all = flags.first == EvaluateFlags().first;
  return {
      {"--part", flags.part},
      {"--mode", flags.mode},
      {"--length", std::to_string(flags.length)},
      {"--first", all ? "all" : std::to_string(flags.first)},
      {"--weights", flags.model.weights == model::Weights::kBest ? "best" : "latest"},
      {"--dtype", name_of(flags.model.format)},
      {"--device", flags.model.device.substr(0, flags.model.device.find(':'))},
  };
}

std::vector<Field> content_fields(const corpus::Corpus& corpus, const runtime::Model& model) {
  const corpus::Split& split = corpus.split();
  return {
      {"--documents", corpus.separator() ? "documents apart" : "one text"},
      {"the text of --data", corpus.checksum()},
      {"--split", std::to_string(split.train) + "," + std::to_string(split.valid) + "," +
                      std::to_string(split.test)},
      {"the model of --checkpoint", "checksum " + model.checksum()},
  };
}

void evaluate(EvaluateFlags flags, const distributed::Communicator& communicator) {
  check_same(flag_fields(flags), communicator);
  const auto corpus =
      open_corpus_for(flags.model.directory, flags.corpus, /*quiet=*/!communicator.is_main());
  release_freed_memory();  // unpacking a corpus leaves much of it
  if (flags.model.threads == 0)
    flags.model.threads = training::default_threads(communicator.local_size());
  const DeviceReader opened = open_device_reader(flags.model, communicator.local_rank());
  if (communicator.size() > 1 && flags.mode != "windowed" && opened.device.is_cpu() &&
      flags.model.format != runtime::Format::kFile)
    throw UsageError(
        "--dtype in several processes needs --mode windowed; for the carried figure "
        "write the model in that type by `gateloop quantize` and evaluate that");
  check_same(content_fields(corpus, opened.model), communicator);
  print_scores(
      flags, corpus, opened.model.spec(),
      [&](auto text, const auto& options) {
        return training::evaluate_over_processes(*opened.reader, opened.modules, text, options,
                                                 communicator);
      },
      /*quiet=*/!communicator.is_main());
}

}  // namespace

void add_evaluate_command(CLI::App& app) {
  auto flags = std::make_shared<EvaluateFlags>();
  add_evaluate_flags(app, *flags)->callback([flags] {
    const std::string backend = flags->model.device == kCpu ? "gloo" : "auto";
    work_together(backend, flags->timeout, [&](const distributed::Communicator& communicator) {
      evaluate(*flags, communicator);
    });
  });
}

}  // namespace gateloop::app
