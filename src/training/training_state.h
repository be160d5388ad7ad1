#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "gateloop/nn/transformer.h"
#include "training/optimizer.h"

namespace gateloop::training {

/// Where a run stands, besides its tensors.
struct Position {
  std::int64_t step = 0;  ///< updates made
  double elapsed_seconds = 0;
  double best_bits_per_byte = std::numeric_limits<double>::infinity();
  std::int64_t best_step = 0;
  std::vector<PlannedLength> plan;  ///< of TrainingOptions, as far as it went
  /// The log's line of a run's last step, which waits for the final validation; else "".
  std::string last_line;
};

/// training_state.safetensors: parameters ("model.NAME"), moments ("exp_avg.NAME",
/// "exp_avg_sq.NAME") and the position. One file and one rename: resuming reads the step whole
/// or not at all. `moments` are those of Optimizer::state().
void save_state(const std::filesystem::path& path, const torch::nn::Module& model,
                std::map<std::string, torch::Tensor> moments, const Position& position);
/// Every process calls it: they go on from the file that process 0 has, or from process 0's model
/// where it has none. Throws std::runtime_error naming the path and what does not fit.
Position take_up(const std::filesystem::path& path, torch::nn::Module& model, Optimizer& optimizer,
                 const distributed::Communicator& communicator);

}  // namespace gateloop::training
