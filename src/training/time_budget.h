#pragma once

#include <cstdint>
#include <optional>

#include "gateloop/training.h"

namespace gateloop::training {

/// Turns --minutes into a number of steps: watches the first updates, then says how many fit.
/// The updates watched lie in the warm-up (or under a constant rate), whose learning rates do not
/// depend on that number; a run with --steps of the same number is therefore the same run.
class TimeBudget {
 public:
  explicit TimeBudget(const TrainingOptions& options);

  /// One update took `seconds`; `step` counts updates made, this one included.
  void record(std::int64_t step, double seconds);
  /// Enough has been seen, or the warm-up is about to end.
  bool ready(std::int64_t step) const;

  struct Costs {
    double elapsed;           ///< seconds since the run began
    double validation;        ///< one validation
    double final_validation;  ///< the last one
    double checkpoint;        ///< one checkpoint
  };
  /// Steps in all that fit, at least `step`.
  std::int64_t steps_that_fit(std::int64_t step, const Costs& costs) const;

 private:
  const TrainingOptions& options_;
  double budget_;  // seconds
  std::int64_t first_step_ = 0;
  std::int64_t timed_ = 0;
  double timed_seconds_ = 0;
};

}  // namespace gateloop::training
