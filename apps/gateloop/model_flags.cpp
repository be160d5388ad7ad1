#include "model_flags.h"

#include <filesystem>

#include "commands.h"
#include "model/config_file.h"

namespace gateloop::app {

void add_directory_flag(CLI::App& command, std::string& directory) {
  command.add_option("--checkpoint", directory, "Directory written by gateloop train (required)")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
}

void add_checkpoint_flags(CLI::App& command, ModelFlags& flags) {
  using model::Weights;
  add_directory_flag(command, flags.directory);
  command
      .add_option("--weights", flags.weights,
                  "latest: as last saved (default); best: as at the best validation")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, Weights>{{"latest", Weights::kLatest}, {"best", Weights::kBest}}))
      ->type_name("latest|best");
}

const std::map<std::string, runtime::Format>& formats() {
  using runtime::Format;
  static const std::map<std::string, Format> names{{"float32", Format::kFloat32},
                                                   {"bfloat16", Format::kBFloat16},
                                                   {"float16", Format::kFloat16},
                                                   {"int8", Format::kInt8}};
  return names;
}

void add_compute_flags(CLI::App& command, ModelFlags& flags) {
  command
      .add_option("--device", flags.device,
                  "cpu (default), which needs no libtorch; cuda or cuda:N, by libtorch in float32 "
                  "or --dtype; auto: cuda where libtorch finds some, else cpu")
      ->type_name("DEVICE");
  command
      .add_option("--dtype", flags.format,
                  "Type of the matrices (default: as stored); what is stored so is read in place, "
                  "what is not is converted and copied")
      ->transform(CLI::CheckedTransformer(formats()))
      ->type_name("float32|bfloat16|float16|int8");
  add_threads_flag(command, flags.threads);
}

void add_threads_flag(CLI::App& command, int& threads) {
  command
      .add_option("--threads", threads,
                  "Threads to use (default: one for each core that this process may use)")
      ->check(CLI::Range(1, 1024))
      ->type_name("N");
}

void check_directory(const std::string& directory) {
  if (!std::filesystem::exists(std::filesystem::path(directory) / "config.json"))
    throw UsageError("no config.json in " + directory +
                     ": give --checkpoint a directory written by gateloop train");
}

std::optional<bool> trained_on_documents(const std::string& directory) {
  check_directory(directory);
  return model::documents_of(model::read_config(directory, {}));
}

void check_model(const ModelFlags& flags) {
  const std::filesystem::path directory = flags.directory;
  check_directory(flags.directory);
  const bool best = flags.weights == model::Weights::kBest;
  const std::string file = best ? "model.best.safetensors" : "model.safetensors";
  if (!std::filesystem::exists(directory / file))
    throw UsageError("no " + file + " in " + flags.directory + ": " +
                     (best ? "training has not validated yet, use --weights latest"
                           : "training has not saved yet, use another --checkpoint"));
}

runtime::Model open_byte_model(const ModelFlags& flags) {
  check_model(flags);
  const auto tokenizer = std::filesystem::path(flags.directory) / kTokenizer;
  if (std::filesystem::exists(tokenizer))
    throw UsageError("the model in " + flags.directory + " reads the tokens of its " + kTokenizer +
                     ", which are no bytes: use it from Python");
  const bool on_cpu = flags.device == kCpu;
  runtime::Model model(flags.directory, {.weights = flags.weights,
                                         .format = on_cpu ? flags.format : runtime::Format::kFile});
  const auto num_tokens = model.spec().num_tokens;
  if (num_tokens > 256)
    throw UsageError("the model in " + flags.directory + " has " + std::to_string(num_tokens) +
                     " tokens, which are no bytes: expected at most 256");
  return model;
}

runtime::Session open_byte_session(const ModelFlags& flags) {
  return runtime::Session(open_byte_model(flags), {.threads = flags.threads});
}

}  // namespace gateloop::app
