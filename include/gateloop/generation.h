#pragma once

/// Drawing tokens from a model: the rules of sampling, and the loop that reads what was drawn.
/// Without torch; Python's Transformer.generate uses the same sampler.
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "gateloop/runtime.h"

namespace gateloop::generation {

/// Rules apply in this order; each at its default changes nothing but filter_thres, which is the
/// reference's.
struct SamplingOptions {
  /// At least 1. The logits of tokens read or drawn before are divided by it where positive, else
  /// multiplied (Keskar et al. 2019, section 4.1).
  double repetition_penalty = 1.0;
  /// The logits are divided by it. Anything below 1e-6 takes the likeliest token: rounding would
  /// draw it.
  double temperature = 1.0;
  /// In [0, 1]: the ceil((1 - filter_thres) num_tokens) likeliest tokens can be drawn, at least
  /// one: the reference's rule in double arithmetic, 26 of 256 at 0.9; 0 keeps all.
  double filter_thres = 0.9;
  /// Only the k likeliest can be drawn; 0: all.
  std::int64_t top_k = 0;
  /// In (0, 1]: the likeliest tokens that together have this probability (Holtzman et al. 2020).
  double top_p = 1.0;
  /// In [0, 1]: tokens at least this times as probable as the likeliest.
  double min_p = 0.0;
  /// A sequence ends after the first of these that it ends in. None may be empty.
  std::vector<std::vector<std::int64_t>> stop = {};
};

/// Draws tokens from logits with a generator of its own: the same seed, logits and prompt give the
/// same tokens on every machine whose exp() rounds alike.
class GATELOOP_RUNTIME_API Sampler {
 public:
  /// What a sequence that has ended draws.
  static constexpr std::int64_t kEnded = -1;

  /// Throws std::invalid_argument naming the option that is outside its range.
  Sampler(SamplingOptions options, std::uint64_t seed);
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;
  ~Sampler();

  /// Tokens that count as read by the repetition penalty: ids (B, T).
  void read(std::span<const std::int64_t> ids, std::int64_t batch);
  /// The same for packed sequences, see runtime::Session::prefill_packed().
  void read_packed(std::span<const std::int64_t> ids, std::span<const std::int64_t> cu_seqlens);
  /// logits (B, num_tokens) -> tokens (B), kEnded in sequences that had ended before. Throws
  /// std::invalid_argument where B is another than before, std::runtime_error where a row's largest
  /// logit is not finite: the weights are damaged.
  std::vector<std::int64_t> draw(std::span<const float> logits, std::int64_t batch);
  /// Whether every sequence has ended in a stop.
  bool ended() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// The tokens that filter_thres keeps, in [1, num_tokens].
GATELOOP_RUNTIME_API std::int64_t kept_tokens(double filter_thres, std::int64_t num_tokens);

/// Any bytes -> ids (T), one a byte. An empty prompt becomes one newline, the likeliest place for a
/// text to start: a model needs a token to predict from.
GATELOOP_RUNTIME_API std::vector<std::int64_t> encode_prompt(std::string_view text);

struct GenerateOptions {
  std::int64_t length = 512;  ///< tokens to draw for each sequence
  SamplingOptions sampling = {};
  std::uint64_t seed = 0;
};

/// Reads `prompt`, ids (B, T) with T >= 1, then draws up to `length` tokens for each of the B
/// sequences: fewer where all have ended. The reader may have read before: then this continues. It
/// has not read the last token drawn. `on_tokens` gets each step's tokens (B) as they are drawn;
/// returning false stops. Returns (B, tokens drawn), Sampler::kEnded after a sequence's end.
/// Throws as Sampler and the reader do, and std::invalid_argument for a negative length.
GATELOOP_RUNTIME_API std::vector<std::int64_t> generate(
    runtime::Reader& reader, std::span<const std::int64_t> prompt, std::int64_t batch,
    const GenerateOptions& options = {},
    const std::function<bool(std::span<const std::int64_t> tokens)>& on_tokens = {});

}  // namespace gateloop::generation
