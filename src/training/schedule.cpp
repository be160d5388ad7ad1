#include <cmath>
#include <numbers>
#include <stdexcept>

#include "gateloop/training.h"

namespace gateloop::training {

double learning_rate(const TrainingOptions& options, std::int64_t step,
                     std::optional<std::int64_t> steps) {
  const double peak = options.learning_rate;
  const std::int64_t warmup = options.warmup_steps;
  if (step < warmup) {
    return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  }
  if (options.schedule == "constant") return peak;
  if (!steps) throw std::logic_error("the decay needs the number of steps");
  // Progress through the decay, in (0, 1): the last update still moves a little.
  const double progress =
      static_cast<double>(step - warmup + 1) / static_cast<double>(*steps - warmup + 1);
  if (options.schedule == "linear") return peak * (1 - progress);
  return peak * 0.5 * (1 + std::cos(std::numbers::pi * progress));  // cosine
}

}  // namespace gateloop::training
