#pragma once

/// The flags of commands that several processes may run together.
#include <CLI/CLI.hpp>
#include <string>

namespace gateloop::app {

/// Heads these flags in the help.
inline constexpr const char* kProcesses = "Several processes (started by torchrun or srun)";

/// --timeout; `longer_than` says in the help what takes less.
void add_timeout_flag(CLI::App& command, int& seconds, const std::string& longer_than);

}  // namespace gateloop::app
