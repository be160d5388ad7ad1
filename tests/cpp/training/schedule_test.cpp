#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "gateloop/training.h"
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

TrainingOptions with_steps(const char* schedule, std::int64_t steps) {
  TrainingOptions options = options_with(schedule);
  options.steps = steps;
  return options;
}

TEST(Schedule, WarmsUpThenStaysConstant) {
  const TrainingOptions options = with_steps("constant", 10);
  EXPECT_DOUBLE_EQ(learning_rate(options, 0), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(options, 3), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(options, 4), 2.0);
  EXPECT_DOUBLE_EQ(learning_rate(options, 9), 2.0);
}

TEST(Schedule, DecaysLinearlyTowardsZero) {
  const TrainingOptions options = with_steps("linear", 10);
  // Ten steps, six of them after the warm-up: the decay is cut in seven, and ends one part above 0.
  for (std::int64_t step = 4; step < 10; ++step) {
    EXPECT_DOUBLE_EQ(learning_rate(options, step), 2.0 * static_cast<double>(10 - step) / 7);
  }
}

TEST(Schedule, CosineIsHalfwayInTheMiddle) {
  const TrainingOptions options = with_steps("cosine", 9);
  EXPECT_DOUBLE_EQ(learning_rate(options, 6), 1.0);  // progress (6 - 4 + 1) / (9 - 4 + 1)
  EXPECT_GT(learning_rate(options, 8), 0.0);
  EXPECT_LT(learning_rate(options, 8), learning_rate(options, 7));
}

TEST(Schedule, WarmUpDoesNotDependOnTheLength) {
  for (const char* schedule : {"constant", "linear", "cosine"}) {
    for (std::int64_t step = 0; step < 4; ++step) {
      const double rate = learning_rate(options_with(schedule), step);
      EXPECT_EQ(rate, learning_rate(with_steps(schedule, 5), step));
      EXPECT_EQ(rate, learning_rate(with_steps(schedule, 5'000), step));
    }
  }
}

TEST(Schedule, APlanThatKeepsItsLengthIsThatLength) {
  for (const char* schedule : {"constant", "linear", "cosine"}) {
    TrainingOptions options = options_with(schedule);
    options.plan = {{.step = 2, .steps = 20}};
    for (std::int64_t step = 0; step < 20; ++step) {
      EXPECT_EQ(learning_rate(options, step), learning_rate(with_steps(schedule, 20), step));
    }
    options.plan = {{.step = 2, .steps = 20}, {.step = 9, .steps = 20}};
    for (std::int64_t step = 0; step < 20; ++step) {
      // Two sums of the same parts: some units in the last place.
      EXPECT_NEAR(learning_rate(options, step), learning_rate(with_steps(schedule, 20), step),
                  1e-14);
    }
  }
}

TEST(Schedule, ANewLengthBendsTheDecayWithoutAJump) {
  TrainingOptions options = options_with("linear");
  options.plan = {{.step = 8, .steps = 14}, {.step = 10, .steps = 20}};
  EXPECT_EQ(learning_rate(options, 7), 2.0);  // no length is planned: no decay
  EXPECT_FALSE(planned_steps(options, 7));
  EXPECT_DOUBLE_EQ(learning_rate(options, 9), 2.0 * 5 / 7);
  EXPECT_EQ(planned_steps(options, 9), 14);
  // The 5/7 that are left end after ten more steps, in eleven parts.
  for (std::int64_t step = 10; step < 20; ++step) {
    EXPECT_NEAR(learning_rate(options, step), 2.0 * 5 / 7 * static_cast<double>(20 - step) / 11,
                1e-14);
  }
  EXPECT_EQ(planned_steps(options, 10), 20);
}

/// A machine that runs train()'s loop by a clock of its own.
struct Machine {
  TrainingOptions options;
  double final_share = 10;  // seconds of a step, of the validations and of a checkpoint, at speed 1
  double step_seconds = 0.1;
  double validation_seconds = 0.5;
  double checkpoint_seconds = 0.3;
  std::function<double(double now)> speed = [](double) { return 1.0; };

  double now = 0;
  std::int64_t steps = 0;

  double spend(double seconds) {
    const double begin = now;
    now += seconds / speed(now);
    return now - begin;
  }

  void run() {
    TimeBudget budget(options, final_share);
    const auto planned = [&] { return planned_steps(options, steps); };
    while (!planned() || steps < *planned()) {
      budget.record_step(spend(step_seconds));
      ++steps;
      if (budget.ready()) {
        if (!budget.validation_timed()) {
          budget.record_validation(spend(validation_seconds));
          budget.record_checkpoint(spend(checkpoint_seconds));
        }
        if (const auto length = budget.new_length(steps, planned(), now)) {
          options.plan.push_back({steps, *length});
        }
      }
      const bool finished = planned() && steps >= *planned();
      if (steps % options.validate_every == 0 || finished) {
        budget.record_validation(spend(validation_seconds));
      }
      if (finished) spend(validation_seconds * final_share);
      if (steps % options.checkpoint_every == 0 || finished) {
        budget.record_checkpoint(spend(checkpoint_seconds));
      }
    }
  }
};

TrainingOptions minutes(double count) {
  TrainingOptions options = options_with("linear");
  options.minutes = count;
  options.validate_every = 100;
  options.checkpoint_every = 200;
  return options;
}

TEST(TimeBudget, EndsInTimeWhateverTheSpeedDoes) {
  const std::function<double(double)> speeds[] = {
      [](double) { return 1.0; },
      [](double now) { return now < 150 ? 1.0 : 2.0; },
      [](double now) { return now < 150 ? 1.0 : 0.5; },
      [](double now) { return now < 285 ? 1.0 : 0.5; },
      [](double now) { return now < 285 ? 1.0 : 2.0; },
      [](double now) { return std::fmod(now, 40) < 20 ? 1.0 : 0.6; },
  };
  for (const auto& speed : speeds) {
    Machine machine{.options = minutes(5), .speed = speed};
    machine.run();
    EXPECT_NEAR(machine.now, 300, 0.02 * 300) << machine.steps;
    // A new length at one step in 15 at most: 132 entries in the last case, which never settles.
    EXPECT_LT(std::ssize(machine.options.plan), machine.steps / 15);
    // The decay ends near 0 all the same, and never rises.
    double last = 2.0;
    for (std::int64_t step = 4; step < machine.steps; ++step) {
      const double rate = learning_rate(machine.options, step);
      EXPECT_LE(rate, last) << step;
      last = rate;
    }
    EXPECT_LT(last, 0.02 * 2.0);
  }
}

TEST(TimeBudget, ASteadyMachineNeedsOneEstimate) {
  Machine machine{.options = minutes(5)};
  machine.run();
  EXPECT_EQ(machine.options.plan.size(), 1U);
}

TEST(TimeBudget, AStepLongerThanTheBudgetIsTheOnlyOne) {
  Machine machine{.options = minutes(0.01), .step_seconds = 5};
  machine.run();
  EXPECT_EQ(machine.steps, 1);
}

}  // namespace
}  // namespace gateloop::training
