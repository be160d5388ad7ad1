#pragma once

#include <cstdint>
#include <optional>

#include "gateloop/training.h"

namespace gateloop::training {

/// Estimates how many steps fit into --minutes, from what the last steps took.
class TimeBudget {
 public:
  /// The last validation takes `final_share` times as long as the others.
  TimeBudget(const TrainingOptions& options, double final_share);

  void record_step(double seconds);
  /// One validation over validation_windows.
  void record_validation(double seconds);
  void record_checkpoint(double seconds);

  /// Enough steps were timed for a first estimate.
  bool ready() const;
  bool validation_timed() const { return validation_steps_.has_value(); }
  /// Steps in all that fit where `step` were made in `elapsed` seconds, at least `step`; nullopt
  /// where `planned` steps end near enough to the budget.
  std::optional<std::int64_t> new_length(std::int64_t step, std::optional<std::int64_t> planned,
                                         double elapsed) const;

 private:
  double seconds_per_step() const { return seconds_ / steps_; }

  const TrainingOptions& options_;
  double final_share_;
  double budget_;  // seconds
  // The last steps and what they took, older ones with less weight.
  double steps_ = 0;
  double seconds_ = 0;
  std::optional<double> validation_steps_;  // what one validation takes, in steps
  double checkpoint_seconds_ = 0;
};

}  // namespace gateloop::training
