#pragma once

#include <csignal>

namespace gateloop::training {

/// While it lives, SIGINT and SIGTERM only ask the loop to stop; a second one ends the process as
/// usual. SIGXFSZ is ignored, so that a file over the size limit is an error of write(). One at a
/// time.
class StopSignals {
 public:
  StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  ~StopSignals();

  /// The signal that came, or 0.
  int received() const;

 private:
  struct sigaction interrupt_before_ {
  }, terminate_before_{}, file_size_before_{};
};

}  // namespace gateloop::training
