// The commands of gateloop-train: those that several processes run together.
#include "commands.h"

namespace gateloop::app {

void become_other_program(int, char**) {}

void add_commands(CLI::App& app) {
  add_train_command(app);
  add_evaluate_command(app);
}

}  // namespace gateloop::app
