#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>

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
};

/// training_state.safetensors: parameters ("model.NAME"), moments ("exp_avg.NAME",
/// "exp_avg_sq.NAME") and the position. One file and one rename: resuming sees the step whole or
/// not at all.
void save_state(const std::filesystem::path& path, const torch::nn::Module& model,
                const Optimizer& optimizer, const Position& position);
/// Throws std::runtime_error naming the path and what does not fit.
Position load_state(const std::filesystem::path& path, torch::nn::Module& model,
                    Optimizer& optimizer);

}  // namespace gateloop::training
