#pragma once

/// Sampling from a trained model: one token at a time, at a cost that does not depend on how many
/// came before (GateLoop layers; full attention reads a key/value cache that grows).
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "gateloop/nn/transformer.h"

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

/// What a Decoder carries from token to token: a value. Decoders that continue from copies of one
/// state give what each would give alone. Default-constructed: the start of a sequence.
struct DecoderState {
  nn::TransformerState layers;
  std::int64_t batch = 0;     ///< sequences; 0 before the first token
  std::int64_t position = 0;  ///< tokens read, per sequence

  /// Memory of all sequences together. Constant for GateLoop layers.
  std::int64_t bytes() const;
};

/// Reads tokens and returns the logits of the next, carrying the model's state; B sequences advance
/// together. It goes past the model's modules and holds the tensors that they read when it is
/// built:
///
/// - all are shared with the model, and the first single token moves the matrices to large pages
///   (Linux), at the same addresses. One token of one sequence is one operator with max heads;
/// - the matrices are copied by the first read() of two and more sequences, into the layout of
///   oneDNN's products: as much memory again. Copies of the decoder share them.
///
/// The model's weights must not change meanwhile: see read(). Copies of a decoder may read in
/// different threads.
class Decoder {
 public:
  /// `prefill_chunk`: tokens per sequence read in one pass, which bounds the memory of a long
  /// prompt; any value gives the same numbers up to rounding. Throws std::invalid_argument below 1.
  explicit Decoder(nn::Transformer model, std::int64_t prefill_chunk = 1024);

  /// ids (B, T) int64, T >= 1 -> logits (B, num_tokens) after the last, without gradients.
  /// Continues from all that was read before; B must then be the same. Throws std::invalid_argument
  /// for another shape or type, std::logic_error where the model's weights have been written,
  /// replaced or converted since the decoder was built, and the model's c10::Error for ids outside
  /// its vocabulary. The state is then undefined: set another.
  torch::Tensor read(const torch::Tensor& ids);

  /// Where the decoder stands, and to continue from elsewhere, with another B if need be.
  /// Throws std::invalid_argument for a state of a model with another number of layers.
  DecoderState state() const { return state_; }
  void set_state(DecoderState state);

  std::int64_t state_bytes() const { return state_.bytes(); }
  std::int64_t position() const { return state_.position; }

 private:
  struct Weights;

  nn::Transformer model_;
  std::int64_t prefill_chunk_;
  std::shared_ptr<Weights> weights_;
  DecoderState state_;
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
