#include "training/memory.h"

#include <algorithm>

namespace gateloop::training {

std::int64_t activation_bytes_per_row(const nn::TransformerOptions& options, std::int64_t length) {
  constexpr std::int64_t kBytes = 4;     // float32; autocast keeps some twice, at 2 bytes
  constexpr std::int64_t kBackward = 2;  // gradients in flight, allocator slack
  return model::activations_per_token(model::resolve(options), length) * length * kBytes *
         kBackward;
}

std::int64_t choose_rows_per_pass(const RunConfig& config, std::int64_t rows,
                                  std::int64_t available) {
  const TrainingOptions& training = config.training;
  const std::int64_t bytes = rows * activation_bytes_per_row(config.model, training.length);
  return bytes <= available / 2 ? rows : std::min(rows, training.batch);
}

}  // namespace gateloop::training
