#include "training/memory.h"

#include <algorithm>

namespace gateloop::training {
namespace {

// Passes that were measured took from a third to a half of the upper estimate.
constexpr std::int64_t kOver = 2;

}  // namespace

std::int64_t activation_bytes_per_row(const RunConfig& config) {
  constexpr std::int64_t kBytes = 4;     // float32; autocast keeps some twice, at 2 bytes
  constexpr std::int64_t kBackward = 2;  // gradients in flight, allocator slack
  const std::int64_t length = config.training.length;
  const model::ModelSpec spec = model::resolve(config.model);
  std::int64_t kept = 0, largest = model::activations_per_token(spec, length);
  if (config.training.checkpoint_blocks) {
    largest = 0;
    for (const model::LayerSpec& layer : spec.layers) {
      model::ModelSpec one = spec;
      one.layers = {layer};
      largest = std::max(largest, model::activations_per_token(one, length));
      kept += 2 * spec.dim;  // behind a post-norm the sum and its norm
    }
  }
  return (kept + largest) * length * kBytes * kBackward;
}

std::int64_t choose_rows_per_pass(const RunConfig& config, std::int64_t rows,
                                  std::int64_t available) {
  const TrainingOptions& training = config.training;
  const std::int64_t bytes = rows * activation_bytes_per_row(config);
  return bytes <= available / 2 ? rows : std::min(rows, training.batch);
}

std::int64_t choose_replicas(const RunConfig& config, std::int64_t rows) {
  const std::int64_t threads = config.training.threads;
  if (threads < 2 || rows % threads != 0) return 1;
  std::int64_t numbers = 0;
  for (const model::Weight& weight : model::weight_table(model::resolve(config.model))) {
    numbers += weight.numel();
  }
  const std::int64_t gradient = numbers * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t kept = rows / threads * activation_bytes_per_row(config) / kOver;
  return gradient <= kept ? threads : 1;
}

std::optional<std::string> memory_advice(const RunConfig& config, std::int64_t available) {
  const TrainingOptions& training = config.training;
  const std::int64_t bytes = training.rows_per_pass * activation_bytes_per_row(config) / kOver;
  if (available <= 0 || bytes <= available) return std::nullopt;
  const auto gigabytes = [](std::int64_t n) { return std::to_string(n / 1'000'000'000) + " GB"; };
  std::string way = training.rows_per_pass > 1 ? "a smaller rows_per_pass" : "a smaller length";
  if (!training.checkpoint_blocks) way += " or checkpoint_blocks";
  return "A pass of " + std::to_string(training.rows_per_pass) + " x " +
         std::to_string(training.length) + " bytes takes by estimate " + gigabytes(bytes) + ", " +
         gigabytes(available) + " are free: " + way + " needs less";
}

}  // namespace gateloop::training
