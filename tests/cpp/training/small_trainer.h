#pragma once

#include "gateloop/training.h"

namespace gateloop::test {

/// A model and a run that take milliseconds a step.
inline training::RunConfig small_config() {
  training::RunConfig config;
  config.model.dim = 16;
  config.model.depth = 2;
  training::TrainingOptions& options = config.training;
  options.steps = 12;
  // A second thread costs more than it brings to matrices this small. On a busy machine the two
  // wait for each other.
  options.threads = 1;
  options.batch = 2;
  options.accumulation = 2;
  options.length = 24;
  options.learning_rate = 1e-2;
  options.warmup_steps = 3;
  options.validation_windows = 4;
  options.checkpoint_every = 4;
  return config;
}

}  // namespace gateloop::test
