// The commands of gateloop-train: those that several processes run together, or on a GPU.
#include <c10/util/Exception.h>

#include <cstddef>
#include <exception>
#include <string>

#include "commands.h"
#include "processes.h"

namespace gateloop::app {

void become_other_program(int, char**) {}

std::string message_of(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  if (of_torch == nullptr) return error.what();
  const std::string text = of_torch->what_without_backtrace();
  return text.substr(0, text.find('\n'));
}

void add_commands(CLI::App& app) {
  add_train_command(app);
  add_evaluate_command(app);
  add_generate_command(app);
  // As soon as the word is read: a wrong flag has nobody to be told to either.
  app.get_subcommand("generate")->preparse_callback([](std::size_t) { work_alone(); });
}

}  // namespace gateloop::app
