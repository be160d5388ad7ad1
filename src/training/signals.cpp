#include "training/signals.h"

#include <array>
#include <csignal>
#include <ctime>

namespace gateloop::training {
namespace {

// From a terminal: HUP, INT, QUIT. From kill, containers and init systems: TERM. From batch
// schedulers before their time limit: USR1, USR2, XCPU.
constexpr std::array kStop = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU};
constexpr std::array kIgnored = {SIGPIPE, SIGXFSZ};

volatile std::sig_atomic_t received_signal = 0;
std::timespec received_at;
std::array<struct sigaction, NSIG> before;

/// timeout(1), shells and schedulers signal a process twice, once by itself and once in its group;
/// the second must not end it unsaved. A person presses Ctrl-C a second time later than that.
void record_signal(int signal) {
  std::timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  if (received_signal == 0) {
    received_at = now;
    received_signal = signal;
  } else if (signal == SIGINT && now.tv_sec > received_at.tv_sec + 1) {
    std::signal(SIGINT, SIG_DFL);
    std::raise(SIGINT);
  }
}

/// Sets the handler, unless the signal was ignored.
void handle(int signal, void (*handler)(int)) {
  auto& old = before[static_cast<std::size_t>(signal)];
  ::sigaction(signal, nullptr, &old);
  if (old.sa_handler == SIG_IGN) return;
  struct sigaction action {};
  ::sigemptyset(&action.sa_mask);
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  ::sigaction(signal, &action, nullptr);
}

}  // namespace

StopSignals::StopSignals() {
  received_signal = 0;
  for (const int signal : kStop) handle(signal, record_signal);
  for (const int signal : kIgnored) handle(signal, SIG_IGN);
}

StopSignals::~StopSignals() {
  for (const int signal : kStop) ::sigaction(signal, &before[std::size_t(signal)], nullptr);
  for (const int signal : kIgnored) ::sigaction(signal, &before[std::size_t(signal)], nullptr);
}

int StopSignals::received() const { return received_signal; }

}  // namespace gateloop::training
