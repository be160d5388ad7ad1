#include "processes.h"

#include <chrono>
#include <csignal>
#include <cstdio>
#include <stdexcept>

#include "commands.h"

namespace gateloop::app {

distributed::Communicator work_together(
    const std::string& backend, int timeout,
    const std::function<void(const distributed::Communicator&)>& work) {
  // A reader of our output that goes away must not end the others without a word.
  std::signal(SIGPIPE, SIG_IGN);
  try {
    distributed::JoinOptions options;
    options.on_wait = [](const std::string& text) {
      std::fprintf(stderr, "gateloop: %s\n", text.c_str());
    };
    options.backend = backend;
    options.timeout = std::chrono::seconds(timeout);
    const auto communicator =
        distributed::Communicator::join(distributed::launch_from_environment(), options);
    communicator.report_failures([&] { work(communicator); });
    return communicator;
  } catch (const std::invalid_argument& error) {
    throw UsageError(error.what());
  } catch (const c10::Error& error) {  // a page of detail comes after the first line
    const std::string text = error.what_without_backtrace();
    throw std::runtime_error(text.substr(0, text.find('\n')));
  }
}

}  // namespace gateloop::app
