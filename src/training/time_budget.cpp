#include "training/time_budget.h"

#include <algorithm>
#include <cmath>

namespace gateloop::training {
namespace {

// Fractions of the budget. A first estimate after a fiftieth of the time is within some 10 per
// cent, and is corrected later.
constexpr double kFirstEstimate = 0.02;
// A step loses its weight over this time: long enough to average over what else the machine does.
constexpr double kRememberedShare = 0.05;
// Held back for what is not timed, such as the last sample.
constexpr double kReserve = 0.005;
// A length is kept while its end misses the budget by at most the sum of two shares: of the budget,
// and of what is left.
constexpr double kTolerance = 0.005;
constexpr double kToleranceOfRest = 0.02;

}  // namespace

TimeBudget::TimeBudget(const TrainingOptions& options, double final_share)
    : options_(options), final_share_(final_share), budget_(options.minutes.value_or(0) * 60) {}

void TimeBudget::record_step(double seconds) {
  const double weight = std::exp(-seconds / (kRememberedShare * budget_));
  steps_ = weight * steps_ + 1;
  seconds_ = weight * seconds_ + seconds;
}

// In steps: a machine that slows down takes longer for both.
void TimeBudget::record_validation(double seconds) {
  validation_steps_ = seconds / seconds_per_step();
}

void TimeBudget::record_checkpoint(double seconds) { checkpoint_seconds_ = seconds; }

bool TimeBudget::ready() const { return seconds_ >= kFirstEstimate * budget_; }

std::optional<std::int64_t> TimeBudget::new_length(std::int64_t step,
                                                   std::optional<std::int64_t> planned,
                                                   double elapsed) const {
  const double validation = validation_steps_.value_or(0) * seconds_per_step();
  double per_step = seconds_per_step();
  if (options_.validate_every > 0) {
    per_step += validation / static_cast<double>(options_.validate_every);
  }
  if (options_.checkpoint_every > 0) {
    per_step += checkpoint_seconds_ / static_cast<double>(options_.checkpoint_every);
  }
  const double at_end = validation * (1 + final_share_) + checkpoint_seconds_;
  const double left = budget_ * (1 - kReserve) - elapsed - at_end;
  if (planned) {
    const double miss = left - static_cast<double>(*planned - step) * per_step;
    if (std::abs(miss) <= kTolerance * budget_ + kToleranceOfRest * std::abs(left)) return {};
  }
  constexpr double kMostSteps = 1e15;  // far from overflow
  const auto steps =
      step + static_cast<std::int64_t>(std::clamp(std::floor(left / per_step), 0.0, kMostSteps));
  return steps == planned ? std::nullopt : std::optional(steps);
}

}  // namespace gateloop::training
