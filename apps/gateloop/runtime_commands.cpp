// The commands of gateloop: those that read models, and train, which is another program. So is
// evaluate in several processes.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "commands.h"

namespace gateloop::app {
namespace {

/// OpenMP's threads wait for each other by spinning, by default for milliseconds. Where anything
/// else runs on the machine, they keep the core that the other thread needs. A quick step on two
/// cores, in ms, alone and beside two busy processes: 179 and 750 by default, 166 and 370 with
/// this. The library reads the variable as it is loaded.
void limit_spinning() {
  if (::getenv("OMP_WAIT_POLICY") == nullptr) ::setenv("GOMP_SPINCOUNT", "3000", /*overwrite=*/0);
}

/// Whether a launcher has started this process and others. What is wrong in its variables the other
/// program says: distributed::launch_from_environment() reads them.
bool is_one_of_several() {
  const auto variable = [](const char* name) {
    const char* value = ::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (!variable("RANK").empty() || !variable("WORLD_SIZE").empty())
    return variable("WORLD_SIZE") != "1";
  const std::string tasks = variable("SLURM_STEP_NUM_TASKS");
  return !variable("SLURM_PROCID").empty() && !tasks.empty() && tasks != "1";
}

}  // namespace

void become_other_program(int argc, char** argv) {
  const std::string command = argc < 2 ? "" : argv[1];
  if (command != "train" && (command != "evaluate" || !is_one_of_several())) return;
  limit_spinning();
  const auto program = std::filesystem::read_symlink("/proc/self/exe");
  const auto trainer = program.parent_path() / "gateloop-train";
  ::execv(trainer.c_str(), argv);
  throw std::runtime_error(
      "cannot run " + trainer.string() +
      ": it is built where libtorch is (GATELOOP_TORCH), and trains, and evaluates in "
      "several processes");
}

void add_commands(CLI::App& app) {
  app.add_subcommand("train", "Train a model on the bytes of a file.");
  add_evaluate_command(app);
  add_generate_command(app);
  add_info_command(app);
  add_quantize_command(app);
}

}  // namespace gateloop::app
