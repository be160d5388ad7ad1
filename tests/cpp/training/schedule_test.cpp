#include <gtest/gtest.h>

#include "gateloop/training.h"
#include "training/files.h"
#include "training/time_budget.h"

namespace gateloop::training {
namespace {

TrainingOptions options_with(const char* schedule) {
  TrainingOptions options;
  options.learning_rate = 2.0;
  options.warmup_steps = 4;
  options.schedule = schedule;
  return options;
}

TEST(Schedule, WarmsUpThenStaysConstant) {
  const TrainingOptions options = options_with("constant");
  EXPECT_DOUBLE_EQ(learning_rate(options, 0, 10), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(options, 3, 10), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(options, 4, 10), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(options, 9, std::nullopt), 2.0);
}

TEST(Schedule, DecaysLinearlyTowardsZero) {
  const TrainingOptions options = options_with("linear");
  // Ten steps, six of them after the warm-up: the decay is cut in seven, and ends one part above 0.
  for (std::int64_t step = 4; step < 10; ++step) {
    EXPECT_DOUBLE_EQ(learning_rate(options, step, 10), 2.0 * static_cast<double>(10 - step) / 7);
  }
}

TEST(Schedule, CosineIsHalfwayInTheMiddle) {
  const TrainingOptions options = options_with("cosine");
  EXPECT_DOUBLE_EQ(learning_rate(options, 6, 9), 1.0);  // progress (6 - 4 + 1) / (9 - 4 + 1)
  EXPECT_GT(learning_rate(options, 8, 9), 0.0);
  EXPECT_LT(learning_rate(options, 8, 9), learning_rate(options, 7, 9));
}

TEST(Schedule, WarmUpDoesNotDependOnTheLength) {
  for (const char* schedule : {"constant", "linear", "cosine"}) {
    const TrainingOptions options = options_with(schedule);
    for (std::int64_t step = 0; step < options.warmup_steps; ++step) {
      EXPECT_EQ(learning_rate(options, step, std::nullopt), learning_rate(options, step, 5));
      EXPECT_EQ(learning_rate(options, step, 5), learning_rate(options, step, 5'000));
    }
  }
}

TrainingOptions minutes(double count, std::int64_t warmup) {
  TrainingOptions options = options_with("linear");
  options.minutes = count;
  options.warmup_steps = warmup;
  options.validate_every = 10;
  options.checkpoint_every = 20;
  return options;
}

TEST(TimeBudget, CountsStepsValidationsAndCheckpoints) {
  const TrainingOptions options = minutes(1, 100);
  TimeBudget budget(options);
  budget.record(1, 30.0);  // the first two are not counted
  budget.record(2, 30.0);
  std::int64_t step = 2;
  while (!budget.ready(step)) budget.record(++step, 0.5);
  EXPECT_EQ(step, kFewestTimedSteps);
  // 60 s less 2 per cent, 4 s gone, 1 + 10 + 2 s at the end: 41.8 s at 0.5 + 1/10 + 2/20 a step.
  EXPECT_EQ(budget.steps_that_fit(
                step, {.elapsed = 4, .validation = 1, .final_validation = 10, .checkpoint = 2}),
            step + 59);
}

TEST(TimeBudget, IsReadyBeforeTheDecayBegins) {
  const TrainingOptions options = minutes(1000, 12);
  TimeBudget budget(options);
  std::int64_t step = 0;
  while (!budget.ready(step)) budget.record(++step, 0.001);
  EXPECT_EQ(step, 12);
}

TEST(TimeBudget, NeverAsksForFewerStepsThanWereMade) {
  const TrainingOptions options = minutes(0.01, 100);
  TimeBudget budget(options);
  std::int64_t step = 0;
  while (!budget.ready(step)) budget.record(++step, 5.0);
  EXPECT_EQ(step, 3);
  EXPECT_EQ(budget.steps_that_fit(
                step, {.elapsed = 15, .validation = 1, .final_validation = 1, .checkpoint = 1}),
            step);
}

}  // namespace
}  // namespace gateloop::training
