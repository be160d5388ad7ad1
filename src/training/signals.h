#pragma once

namespace gateloop::training {

/// While one lives, a signal that would end the process only stops the loop, however often it
/// comes. One exception: a SIGINT more than a second after the first signal ends the process at
/// once. A signal that was ignored before (nohup) stays ignored. SIGPIPE and SIGXFSZ are ignored: a
/// lost reader or a file over the size limit is an error of write(). One object at a time.
class StopSignals {
 public:
  StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  ~StopSignals();

  /// The first signal that came, or 0.
  int received() const;
};

}  // namespace gateloop::training
