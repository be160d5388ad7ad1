#pragma once

/// Sampling from a trained model: one token at a time, at a cost that does not depend on how many
/// came before (GateLoop layers; full attention reads a key/value cache that grows).
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "gateloop/nn/transformer.h"

namespace gateloop::nn {
class PackedWeights;
}  // namespace gateloop::nn

namespace gateloop::generation {

struct SamplingOptions {
  /// The logits are divided by it. Zero, or anything below 1e-6, takes the likeliest token.
  double temperature = 1.0;
  /// In [0, 1): only the k = ceil((1 - threshold) num_tokens) largest logits can be drawn, the
  /// reference's rule, in double arithmetic as written: 26 of 256 at 0.9; 0 keeps all.
  double top_k_threshold = 0.9;
};

/// The k of top_k_threshold, in [1, num_tokens]. Throws std::invalid_argument outside [0, 1).
std::int64_t top_k(double threshold, std::int64_t num_tokens);

/// Draws tokens from logits by the Gumbel trick: argmax of logit / temperature + noise has the
/// distribution softmax(logit / temperature). Owns its generator: the same seed and logits give the
/// same tokens, whatever else draws random numbers in the process.
class Sampler {
 public:
  /// Throws std::invalid_argument for a negative or non-finite temperature or a threshold outside
  /// [0, 1).
  Sampler(SamplingOptions options, std::uint64_t seed);

  /// logits (B, num_tokens), any floating type -> tokens (B) int64 on the CPU.
  /// Throws std::runtime_error if a row's largest logit is not finite: the model is broken.
  torch::Tensor operator()(const torch::Tensor& logits);

 private:
  SamplingOptions options_;
  at::Generator generator_;
};

/// What one sequence carries from token to token.
struct StateSize {
  std::int64_t fixed = 0;      ///< bytes, however long the sequence
  std::int64_t per_token = 0;  ///< bytes more for every token read: zero for GateLoop layers
};
/// `dtype`: of the weights.
StateSize state_size(const nn::TransformerOptions& options,
                     torch::ScalarType dtype = torch::kFloat32);

/// Reads tokens and answers with the logits of the next, carrying the model's state. B sequences
/// advance together. Runs in inference mode and does not change the model. Two and more sequences
/// read a copy of its matrices, made by the first read() and as large, in the layout of oneDNN's
/// products: start a new decoder for a model whose weights have changed.
class Decoder {
 public:
  /// `prefill_chunk`: tokens per sequence read in one pass, which bounds the memory of a long
  /// prompt; any value gives the same numbers up to rounding.
  explicit Decoder(nn::Transformer model, std::int64_t prefill_chunk = 1024);

  /// ids (B, T) int64, T >= 1 -> logits (B, num_tokens) after the last. Continues from all that was
  /// read before; B must then be the same. Throws std::invalid_argument for another shape or type,
  /// and the model's c10::Error for ids outside its vocabulary; start a new decoder after that.
  torch::Tensor read(const torch::Tensor& ids);

  /// Memory of the carried state, all B sequences together. Constant for GateLoop layers.
  std::int64_t state_bytes() const;
  /// Tokens read so far, per sequence.
  std::int64_t position() const { return position_; }

 private:
  nn::Transformer model_;
  std::int64_t prefill_chunk_;
  torch::Device device_;
  std::shared_ptr<const nn::PackedWeights> packed_;
  bool in_large_pages_ = false;
  nn::TransformerState state_;
  std::int64_t batch_ = 0;
  std::int64_t position_ = 0;
};

/// UTF-8 or any bytes -> ids (1, T) int64, one per byte. An empty prompt becomes one newline, the
/// likeliest place for a text to start: a model needs a token to predict from.
torch::Tensor encode_prompt(std::string_view text);

struct GenerateOptions {
  std::int64_t length = 512;  ///< tokens to draw, per sequence
  SamplingOptions sampling;
  std::uint64_t seed = 0;
};

/// Reads `prompt` (B, T) int64, T >= 1, then draws `length` tokens for each of the B sequences.
/// `on_token` gets each step's tokens (B) int64 as soon as they are drawn; returning false stops.
/// Returns the tokens drawn, (B, length) or fewer columns if stopped, without the prompt.
/// The decoder may have read before: then this continues. It has not read the last token drawn.
/// Throws as Sampler and Decoder::read, and std::invalid_argument for a negative length.
torch::Tensor generate(Decoder& decoder, const torch::Tensor& prompt,
                       const GenerateOptions& options = {},
                       const std::function<bool(const torch::Tensor& tokens)>& on_token = {});

}  // namespace gateloop::generation
