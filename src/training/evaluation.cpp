#include "gateloop/evaluation.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "training/autocast.h"
#include "training/device.h"

namespace gateloop::training {
namespace {

/// Eval mode for one scope.
class EvalScope {
 public:
  explicit EvalScope(torch::nn::Module& module)
      : module_(module), was_training_(module.is_training()) {
    module_.eval();
  }
  ~EvalScope() { module_.train(was_training_); }
  EvalScope(const EvalScope&) = delete;
  EvalScope& operator=(const EvalScope&) = delete;

 private:
  torch::nn::Module& module_;
  bool was_training_;
};

void check(const nn::TransformerOptions& model, std::span<const std::uint8_t> text,
           const EvaluationOptions& options) {
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("evaluate: " + what);
  };
  if (options.length < 1) fail("length must be at least 1, not " + std::to_string(options.length));
  if (options.bytes_per_pass < 1)
    fail("bytes_per_pass must be at least 1, not " + std::to_string(options.bytes_per_pass));
  if (options.windows < 0)
    fail("windows must not be negative, got " + std::to_string(options.windows));
  if (text.size() < 2)
    fail("the text has " + std::to_string(text.size()) +
         " bytes; at least 2 are needed, one to read and one to predict");
  const int largest = *std::max_element(text.begin(), text.end());
  if (largest >= model.num_tokens)
    fail("the text holds byte " + std::to_string(largest) + ", the model knows only ids below " +
         std::to_string(model.num_tokens));
}

/// `rows` sequences of length + 1 bytes, one starting `length` after the other, so that the last
/// byte of each is the first of the next -> ids (rows, length + 1) int64.
torch::Tensor rows_of(const std::uint8_t* text, std::int64_t rows, std::int64_t length,
                      torch::Device device) {
  // from_blob wants a mutable pointer; `to` copies before anyone could write.
  return torch::from_blob(const_cast<std::uint8_t*>(text), {rows, length + 1}, {length, 1},
                          torch::kUInt8)
      .to(device, torch::kInt64);
}

/// ids (B, T + 1) -> sum over B x T of -ln p, the softmax in at least float32.
double surprise(nn::Transformer& model, const torch::Tensor& ids) {
  const auto length = ids.size(1) - 1;
  auto logits = model->forward(ids.narrow(1, 0, length)).flatten(0, 1);
  if (at::isReducedFloatingType(logits.scalar_type())) logits = logits.to(torch::kFloat32);
  const auto targets = ids.narrow(1, 1, length).flatten();
  return at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum).item<double>();
}

}  // namespace

std::int64_t window_count(std::span<const std::uint8_t> text, std::int64_t length) {
  return (std::ssize(text) - 1) / length;
}

Score evaluate_windows(nn::Transformer model, std::span<const std::uint8_t> text,
                       const EvaluationOptions& options) {
  check(model->options(), text, options);
  const auto device = device_of(model);
  const torch::NoGradGuard no_grad;
  const EvalScope eval(*model);
  const Autocast autocast(device.type(), options.dtype);

  const auto available = window_count(text, options.length);
  const auto rows_per_pass = std::max<std::int64_t>(1, options.bytes_per_pass / options.length);
  Score score;
  if (options.windows > 0 && options.windows < available) {
    const auto total = options.windows * options.length;
    for (std::int64_t first = 0; first < options.windows; first += rows_per_pass) {
      std::vector<torch::Tensor> rows;
      for (auto i = first; i < std::min(first + rows_per_pass, options.windows); ++i) {
        const auto start = i * available / options.windows * options.length;
        rows.push_back(rows_of(text.data() + start, 1, options.length, device));
      }
      score.nats += surprise(model, torch::cat(rows));
      score.bytes += std::ssize(rows) * options.length;
      if (options.progress) options.progress(score.bytes, total);
    }
    return score;
  }
  const auto total = std::ssize(text) - 1;
  while (score.bytes < total) {
    const auto left = total - score.bytes;
    const auto length = std::min(options.length, left);  // shorter: the last window, on its own
    const auto rows = std::min(rows_per_pass, left / length);
    score.nats += surprise(model, rows_of(text.data() + score.bytes, rows, length, device));
    score.bytes += rows * length;
    if (options.progress) options.progress(score.bytes, total);
  }
  return score;
}

}  // namespace gateloop::training
