#include "process_flags.h"

namespace gateloop::app {

void add_timeout_flag(CLI::App& command, int& seconds, const std::string& longer_than) {
  command
      .add_option("--timeout", seconds,
                  "Seconds that a process waits for another before all end with an error; more "
                  "than " +
                      longer_than + " [600]")
      ->check(CLI::Range(1, 1'000'000))
      ->type_name("SECONDS")
      ->group(kProcesses);
}

}  // namespace gateloop::app
