#include "training/validation.h"

#include <algorithm>
#include <numbers>

#include "training/autocast.h"
#include "training/batches.h"

namespace gateloop::training {

// Positions in one forward pass: enough for full speed, little memory.
constexpr std::int64_t kPositionsPerPass = 8192;

std::int64_t window_count(std::span<const std::uint8_t> text, std::int64_t length) {
  return (std::ssize(text) - 1) / length;
}

double validate(nn::Transformer& model, std::span<const std::uint8_t> text, std::int64_t length,
                std::int64_t windows, torch::ScalarType dtype) {
  const bool was_training = model->is_training();
  model->eval();
  const c10::InferenceMode inference;
  const Autocast autocast(dtype);
  const std::int64_t available = window_count(text, length);
  windows = std::min(windows, available);
  const std::int64_t rows_per_pass = std::max<std::int64_t>(1, kPositionsPerPass / length);
  double nats = 0;
  for (std::int64_t first = 0; first < windows; first += rows_per_pass) {
    const std::int64_t rows = std::min(rows_per_pass, windows - first);
    torch::Tensor ids = torch::empty({rows, length + 1}, torch::kInt64);  // (rows, T + 1)
    for (std::int64_t row = 0; row < rows; ++row) {
      copy_window(text, (first + row) * available / windows * length, ids[row]);
    }
    nats += model->loss(ids).item<double>() * static_cast<double>(rows);
  }
  if (was_training) model->train();
  return nats / static_cast<double>(windows) / std::numbers::ln2;
}

}  // namespace gateloop::training
