#include <algorithm>
#include <cmath>
#include <numbers>

#include "gateloop/training.h"

namespace gateloop::training {
namespace {

std::vector<PlannedLength> plan_of(const TrainingOptions& options) {
  if (options.steps) return {{.step = 0, .steps = *options.steps}};
  return options.plan;
}

/// Progress through the decay at update `step`, in [0, 1): the last update still moves a little.
/// Each of the plan's entries advances its updates evenly towards the end that it plans.
double progress(const TrainingOptions& options, std::int64_t step) {
  const std::vector<PlannedLength> plan = plan_of(options);
  double progress = 0;
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const std::int64_t begin = std::max(plan[i].step, options.warmup_steps);
    const std::int64_t end = i + 1 < plan.size() ? std::min(plan[i + 1].step, step + 1) : step + 1;
    if (begin >= end) continue;
    progress += (1 - progress) * static_cast<double>(end - begin) /
                static_cast<double>(plan[i].steps - begin + 1);
  }
  return progress;
}

}  // namespace

std::optional<std::int64_t> planned_steps(const TrainingOptions& options, std::int64_t step) {
  std::optional<std::int64_t> steps;
  for (const PlannedLength& planned : plan_of(options)) {
    if (planned.step <= step) steps = planned.steps;
  }
  return steps;
}

double learning_rate(const TrainingOptions& options, std::int64_t step) {
  const double peak = options.learning_rate;
  const std::int64_t warmup = options.warmup_steps;
  if (step < warmup) {
    return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  }
  if (options.schedule == "constant") return peak;
  if (options.schedule == "linear") return peak * (1 - progress(options, step));
  return peak * 0.5 * (1 + std::cos(std::numbers::pi * progress(options, step)));  // cosine
}

}  // namespace gateloop::training
