#pragma once

/// The loop of a run that is set up.
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "distributed/gradient_reduction.h"
#include "gateloop/distributed.h"
#include "gateloop/evaluation.h"
#include "gateloop/training.h"
#include "training/batches.h"
#include "training/metrics.h"
#include "training/optimizer.h"
#include "training/progress.h"
#include "training/replicas.h"
#include "training/signals.h"
#include "training/stopwatch.h"
#include "training/time_budget.h"
#include "training/training_state.h"

namespace gateloop::training {

class Trainer {
 public:
  /// `config` has every option settled; `model` is on its device. Goes on from the state in `dir`
  /// where there is one, and makes the directory a run. Every process of `communicator`
  /// has a Trainer; lengths, norms and signals are settled between them.
  Trainer(RunConfig config, nn::Transformer model, const Corpus& corpus,
          const std::filesystem::path& dir, const SampleCallback& sample, Clock clock,
          distributed::Communicator communicator);
  Result run();

 private:
  StepMetrics update();
  torch::Tensor loss(nn::Transformer& model, const torch::Tensor& ids);
  std::int64_t replica_count() const;
  double backward();
  int received_signal(const StopSignals& signals) const;
  Score validate(std::int64_t windows);
  void validate_now(StepMetrics& metrics);
  void conclude(std::optional<MetricsLog>& log);
  void introduce();
  [[noreturn]] void fail_not_finite(const std::string& what, std::int64_t step) const;
  void check_weights() const;
  void save_checkpoint();
  void save_weights(const char* file) const;
  void time_validation_and_saving();
  void plan_length(StepMetrics& metrics);
  std::optional<std::int64_t> estimated_length();
  std::optional<Sample> sample_now();
  Result result(int signal) const;

  /// Of this process alone.
  double elapsed() const { return elapsed_before_ + since_start_.seconds(); }
  std::int64_t rows() const { return options_.batch * options_.accumulation; }
  std::int64_t rows_per_pass() const { return std::min(options_.rows_per_pass, rows()); }
  std::optional<double> seconds_left() const;
  static bool due(std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; }
  bool due(std::int64_t every) const { return due(every, position_.step); }
  std::optional<std::int64_t> steps() const { return planned_steps(options_, position_.step); }
  bool finished() const { return steps() && position_.step >= *steps(); }
  /// The length is estimated, not given.
  bool estimates() const { return !options_.steps && options_.minutes; }

  RunConfig config_;
  TrainingOptions& options_ = config_.training;
  const Corpus& corpus_;
  std::filesystem::path dir_;
  const SampleCallback& sample_;
  distributed::Communicator communicator_;

  nn::Transformer model_;
  torch::Device device_;
  Optimizer optimizer_;
  Batches batches_;
  Position position_;
  distributed::GradientReduction reduction_;
  Replicas replicas_;
  TimeBudget budget_;
  Progress progress_;
  Clock clock_;
  Stopwatch since_start_;
  double elapsed_before_ = 0;
  std::int64_t first_step_ = 0;  // of this process
  Score final_;
};

}  // namespace gateloop::training
