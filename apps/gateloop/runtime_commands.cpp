// The commands of gateloop: those that read models, and those that are other programs. These are
// train, evaluate in several processes, what reads models on other devices than the CPU, and what
// the Python package draws.
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>

#include "commands.h"
#include "gateloop/launch.h"
#include "model_flags.h"

namespace gateloop::app {
namespace {

/// OpenMP's threads wait for each other by spinning, by default for milliseconds. Where anything
/// else runs on the machine, they keep the core that the other thread needs. A quick step on two
/// cores, in ms, alone and beside two busy processes: 33 and 760 by default, 33 and 73 with this.
/// The library reads the variable as it is loaded.
void limit_spinning() {
  if (::getenv("OMP_WAIT_POLICY") == nullptr) ::setenv("GOMP_SPINCOUNT", "3000", /*overwrite=*/0);
}

/// Whether a launcher has started this process and others.
bool is_one_of_several() {
  try {
    return distributed::launch_from_environment().size > 1;
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  }
}

char** arguments = nullptr;  // of main()

/// After execv() has failed. `origin`: what the program comes with.
[[noreturn]] void fail_to_run(const std::string& program, const std::string& origin) {
  const int error = errno;
  throw std::runtime_error("cannot run " + program + ": " + std::generic_category().message(error) +
                           (error == ENOENT ? "; " + origin : ""));
}

[[noreturn]] void become_torch_program() {
  limit_spinning();
  const auto program = std::filesystem::read_symlink("/proc/self/exe");
  const auto trainer = program.parent_path() / "gateloop-train";
  ::execv(trainer.c_str(), arguments);
  fail_to_run(trainer.string(),
              "it is built where libtorch is (GATELOOP_TORCH), trains, evaluates in several "
              "processes and computes on GPUs");
}

struct PythonCommand {
  const char *name, *help;
};
constexpr PythonCommand kPythonCommands[] = {
    {"watch", "Draw the losses of runs in the terminal, while they go on."},
    {"track", "Send runs to TensorBoard, W&B or MLflow, while they go on."},
    {"report", "Compare runs on one HTML page."},
    {"inspect", "Show on an HTML page what the states of a model keep of a text."},
};

/// A program gateloop-NAME, which comes with the Python package.
[[noreturn]] void become_python_program(const std::string& name) {
  const std::string program = "gateloop-" + name;
  ::execvp(program.c_str(), arguments + 1);
  fail_to_run(
      program,
      "it comes with the Python package gateloop-cpp: pip install it, and see that PATH has "
      "its programs");
}

}  // namespace

void become_other_program(int argc, char** argv) {
  arguments = argv;
  const std::string command = argc < 2 ? "" : argv[1];
  for (const PythonCommand& python : kPythonCommands)
    if (command == python.name) become_python_program(command);
  if (command == "train" || (command == "evaluate" && is_one_of_several())) become_torch_program();
}

std::unique_ptr<runtime::Reader> open_byte_reader(const ModelFlags& flags) {
  if (flags.device != kCpu) become_torch_program();
  return std::make_unique<runtime::Session>(open_byte_session(flags));
}

/// What runs in several processes is in the other program.
void report_to_others(const std::string&) {}

std::string message_of(const std::exception& error) { return error.what(); }

void add_commands(CLI::App& app) {
  app.add_subcommand("train", "Train a model on the bytes of files.");
  add_evaluate_command(app);
  add_generate_command(app);
  add_info_command(app);
  add_quantize_command(app);
  for (const PythonCommand& python : kPythonCommands)
    app.add_subcommand(python.name, std::string(python.help) + " Of the Python package.");
}

}  // namespace gateloop::app
