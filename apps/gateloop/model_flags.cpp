#include "model_flags.h"

#include <filesystem>
#include <map>

#include "commands.h"
#include "gateloop/training.h"

namespace gateloop::app {

void add_checkpoint_flags(CLI::App& command, ModelFlags& flags) {
  using checkpoint::Weights;
  command
      .add_option("--checkpoint", flags.directory, "Directory written by gateloop train (required)")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->type_name("DIR");
  command
      .add_option("--weights", flags.weights,
                  "latest: as last saved (default); best: as at the best validation")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, Weights>{{"latest", Weights::kLatest}, {"best", Weights::kBest}}))
      ->type_name("latest|best");
}

void add_compute_flags(CLI::App& command, ModelFlags& flags, const std::string& dtype_help) {
  command.add_option("--dtype", flags.dtype, dtype_help)
      ->transform(CLI::CheckedTransformer(std::map<std::string, torch::ScalarType>{
          {"float32", torch::kFloat32}, {"bfloat16", torch::kBFloat16}}))
      ->type_name("float32|bfloat16");
  command
      .add_option("--threads", flags.threads,
                  "Threads to use (default: one for each core that this process may use)")
      ->check(CLI::Range(1, 4096))
      ->type_name("N");
}

nn::Transformer load_model(const ModelFlags& flags) {
  const std::filesystem::path directory = flags.directory;
  if (!std::filesystem::exists(directory / "config.json"))
    throw UsageError("no config.json in " + flags.directory +
                     ": give --checkpoint a directory written by gateloop train");
  const bool best = flags.weights == checkpoint::Weights::kBest;
  const std::string file = best ? "model.best.safetensors" : "model.safetensors";
  if (!std::filesystem::exists(directory / file))
    throw UsageError("no " + file + " in " + flags.directory + ": " +
                     (best ? "training has not validated yet, use --weights latest"
                           : "training has not saved yet, use another --checkpoint"));
  torch::set_num_threads(flags.threads > 0 ? flags.threads : training::default_threads());
  auto model = checkpoint::load_model(directory, flags.weights);
  model->eval();
  return model;
}

}  // namespace gateloop::app
