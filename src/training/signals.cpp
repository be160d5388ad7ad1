#include "training/signals.h"

namespace gateloop::training {
namespace {

volatile std::sig_atomic_t received_signal = 0;

void remember(int signal) { received_signal = signal; }

}  // namespace

StopSignals::StopSignals() {
  received_signal = 0;
  struct sigaction action {};
  ::sigemptyset(&action.sa_mask);
  action.sa_handler = remember;
  action.sa_flags = static_cast<int>(SA_RESTART | SA_RESETHAND);
  ::sigaction(SIGINT, &action, &interrupt_before_);
  ::sigaction(SIGTERM, &action, &terminate_before_);
  action.sa_handler = SIG_IGN;
  action.sa_flags = 0;
  ::sigaction(SIGXFSZ, &action, &file_size_before_);
}

StopSignals::~StopSignals() {
  ::sigaction(SIGINT, &interrupt_before_, nullptr);
  ::sigaction(SIGTERM, &terminate_before_, nullptr);
  ::sigaction(SIGXFSZ, &file_size_before_, nullptr);
}

int StopSignals::received() const { return received_signal; }

}  // namespace gateloop::training
