#pragma once

/// One function per subcommand of `gateloop`, each in a file of its own: flags and help, and a
/// callback that calls the library. No logic lives here. Another program, gateloop-train, has
/// train, evaluate in several processes, and what reads models on a GPU. It alone loads libtorch,
/// which takes most of a second.
///
/// A callback ends the program in one of four ways. It returns (exit code 0), throws UsageError (2)
/// or throws any other exception (1). Or it throws CLI::RuntimeError(code), after it has printed
/// the message. main() prints one line for each exception, then calls report_to_others().
#include <CLI/CLI.hpp>
#include <exception>
#include <stdexcept>
#include <string>

namespace gateloop::app {

/// A mistake in the command line that only the callback can find: a file of the wrong kind, or two
/// flags that do not go together. The message is one line and names the remedy.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Replaces this process where another program has the command; each program defines it, and
/// add_commands().
void become_other_program(int argc, char** argv);
void add_commands(CLI::App& app);
/// Where a launcher has started several processes and this one ends before it joins them: they end
/// too, with its error. Each program defines it; takes up to some 15 s where they do not come.
void report_to_others(const std::string& error);

/// What to tell of an error; of libtorch's the first line, which a page of detail follows. Each
/// program defines it.
std::string message_of(const std::exception& error);

void add_train_command(CLI::App& app);
void add_evaluate_command(CLI::App& app);
void add_generate_command(CLI::App& app);
void add_info_command(CLI::App& app);
void add_quantize_command(CLI::App& app);

}  // namespace gateloop::app
