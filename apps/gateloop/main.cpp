#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "commands.h"
#include "output.h"

namespace {

/// One line, whatever is in the file names that the message quotes, and one write: several
/// processes share a terminal.
int report(std::string message, int code) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::cout.flush();
  const std::string line = "gateloop: " + message + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
  return code;
}

/// Of a process that others may wait for.
int report_to_all(const std::string& message, int code, const std::string& remedy = "") {
  report(message + remedy, code);
  gateloop::app::report_to_others(message);
  return code;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

/// CLI11 puts some messages on several lines, and of an unknown command says only that one is
/// required; a usage error here is one line that says what to do.
int report_usage(std::string message, const CLI::App& app) {
  std::string command = "gateloop";
  for (const CLI::App* chosen : app.get_subcommands()) command += ' ' + chosen->get_name();
  if (app.get_subcommands().empty()) {
    std::vector<std::string> names;
    for (const CLI::App* known : app.get_subcommands({})) names.push_back(known->get_name());
    const std::vector<std::string> given = app.remaining();
    message = (given.empty() ? "no command" : "no command \"" + given.front() + "\"") +
              ": there are " + joined(names);
  }
  return report_to_all(message, 2, " (see: " + command + " --help)");
}

/// CLI11's layout, without its own notation: validators beside the type of an option (the text says
/// it), and "{value}" behind the names of a flag.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_name(const CLI::Option* option, bool is_positional) const override {
    std::string name = CLI::Formatter::make_option_name(option, is_positional);
    for (std::size_t at; (at = name.find('{')) != std::string::npos;)
      name.erase(at, name.find('}', at) + 1 - at);
    return name;
  }
  std::string make_option_opts(const CLI::Option* option) const override {
    const std::string type = option->get_type_name();
    if (option->get_items_expected_max() == 0) return "";  // a flag
    // CLI11 itself joins the validators to the type with a colon.
    std::string text = " " + type.substr(0, type.find(':'));
    const std::string preset = option->get_default_str();
    return preset.empty() ? text : text + " [" + preset + "]";
  }
};

/// Weights are read where their file is mapped: pages of a file that became shorter are a SIGBUS.
void name_lost_pages(int) {
  constexpr char kMessage[] =
      "gateloop: the weights of --checkpoint became shorter while they were read\n";
  [[maybe_unused]] const auto written = ::write(STDERR_FILENO, kMessage, sizeof kMessage - 1);
  ::_exit(1);
}

/// Prints the answer to --help or --version.
int show(const CLI::App& app, const CLI::Success& success) {
  app.exit(success);
  try {
    gateloop::app::flush_output();
    return 0;
  } catch (const std::runtime_error& error) {
    return report(error.what(), 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  gateloop::app::occupy_standard_descriptors();
  std::signal(SIGBUS, name_lost_pages);
  CLI::App app("GateLoop Transformer: train, evaluate and sample byte-level language models.",
               argv[0]);
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_version_flag("--version", GATELOOP_VERSION);
  app.require_subcommand(1);
  gateloop::app::add_commands(app);

  try {
    gateloop::app::become_other_program(argc, argv);
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();  // the callback has said why
  } catch (const CLI::Success& success) {
    return show(app, success);
  } catch (const CLI::ParseError& error) {
    return report_usage(error.what(), app);
  } catch (const gateloop::app::UsageError& error) {
    return report_to_all(error.what(), 2);
  } catch (const std::exception& error) {
    return report_to_all(gateloop::app::message_of(error), 1);
  }
}
