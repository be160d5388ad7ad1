#pragma once

#include <chrono>

#include "gateloop/training.h"

namespace gateloop::training {

inline double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Stopwatch {
 public:
  explicit Stopwatch(const Clock& clock) : clock_(clock), start_(clock()) {}
  double seconds() const { return clock_() - start_; }

 private:
  const Clock& clock_;
  double start_;
};

}  // namespace gateloop::training
