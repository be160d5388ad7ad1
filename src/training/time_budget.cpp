#include "training/time_budget.h"

#include <algorithm>
#include <cmath>

#include "training/files.h"

namespace gateloop::training {
namespace {

// The first updates allocate memory and choose kernels.
constexpr std::int64_t kUntimedSteps = 2;
// Watching a twentieth of the time averages over what else the machine does.
constexpr double kWatchedFraction = 0.05;
// Held back for what the estimate leaves out: samples, and a machine that slows down.
constexpr double kReserve = 0.02;

}  // namespace

TimeBudget::TimeBudget(const TrainingOptions& options)
    : options_(options), budget_(options.minutes.value_or(0) * 60) {}

void TimeBudget::record(std::int64_t step, double seconds) {
  if (first_step_ == 0) first_step_ = step;
  if (step - first_step_ < kUntimedSteps) return;
  ++timed_;
  timed_seconds_ += seconds;
}

bool TimeBudget::ready(std::int64_t step) const {
  const bool warm_up_ends = options_.schedule != "constant" && step >= options_.warmup_steps;
  const bool seen_enough =
      timed_ + kUntimedSteps >= kFewestTimedSteps && timed_seconds_ >= kWatchedFraction * budget_;
  // Where ten steps are longer than the budget, three must do.
  const bool out_of_time = timed_ > 0 && timed_seconds_ >= 0.5 * budget_;
  return warm_up_ends || seen_enough || out_of_time;
}

std::int64_t TimeBudget::steps_that_fit(std::int64_t step, const Costs& costs) const {
  if (timed_ == 0) return step;
  double per_step = timed_seconds_ / static_cast<double>(timed_);
  if (options_.validate_every > 0) {
    per_step += costs.validation / static_cast<double>(options_.validate_every);
  }
  if (options_.checkpoint_every > 0) {
    per_step += costs.checkpoint / static_cast<double>(options_.checkpoint_every);
  }
  const double at_end = costs.validation + costs.final_validation + costs.checkpoint;
  const double left = budget_ * (1 - kReserve) - costs.elapsed - at_end;
  return step + static_cast<std::int64_t>(std::max(0.0, std::floor(left / per_step)));
}

}  // namespace gateloop::training
