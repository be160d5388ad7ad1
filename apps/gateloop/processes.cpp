#include "processes.h"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <stdexcept>

#include "commands.h"

namespace gateloop::app {

namespace {

/// From Communicator::join on, the library says to the others why this process ends.
bool has_begun_to_join = false;
bool works_alone = false;

void say(const std::string& text) { std::fprintf(stderr, "gateloop: %s\n", text.c_str()); }

distributed::Communicator join(const std::string& backend, int timeout) {
  distributed::JoinOptions options;
  options.on_wait = say;
  options.backend = backend;
  options.timeout = std::chrono::seconds(timeout);
  try {
    const distributed::Launch launch = distributed::launch_from_environment();
    has_begun_to_join = true;
    return distributed::Communicator::join(launch, options);
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  }
}

}  // namespace

distributed::Communicator work_together(
    const std::string& backend, int timeout,
    const std::function<void(const distributed::Communicator&)>& work) {
  // A reader of our output that goes away must not end the others without a word.
  std::signal(SIGPIPE, SIG_IGN);
  auto communicator = join(backend, timeout);
  communicator.report_failures([&] { work(communicator); });
  return communicator;
}

void work_alone() { works_alone = true; }

void report_to_others(const std::string& error) {
  if (has_begun_to_join || works_alone) return;
  distributed::Launch launch;
  try {
    launch = distributed::launch_from_environment();
  } catch (const std::invalid_argument&) {  // which of the others wait is not known
  }
  distributed::report_absence(launch, error, say);
}

}  // namespace gateloop::app
