#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "gateloop/nn/gate_looped_attention.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"

namespace gateloop::nn {

/// Every option of the reference's Transformer (gateloop-transformer 0.2.5), same names, same
/// defaults; then ours, whose defaults leave the reference's model unchanged.
struct TransformerOptions {
  std::int64_t num_tokens = 256;
  std::int64_t dim = 512;
  std::int64_t depth = 6;
  std::int64_t dim_head = 64;  ///< full attention only
  std::int64_t heads = 8;      ///< full attention only
  std::int64_t ff_mult = 4;
  /// Recompute instead of keeping the (B, T, heads, d, d) states where the head dimension is above
  /// one. With max heads the fused operator always recomputes, block by block.
  bool checkpoint_gate_looped_attn = true;
  bool use_gate_looped_attn = true;
  std::optional<std::int64_t> gate_loop_heads =
      std::nullopt;  ///< default: max heads (the inner dimension)
  bool attn_add_swish_gating = true;
  std::optional<std::int64_t> dim_gate_looped_attn =
      std::nullopt;  ///< inner dimension; default dim
  std::optional<bool> attn_softmax_normalize =
      std::nullopt;  ///< default: not data_dependent_rel_pos
  bool data_dependent_rel_pos = false;
  double frac_gradient_state_transition = 0.9;
  bool ablate_complex = false;
  bool ablate_state_transition = false;
  bool rotary_emb = false;
  bool post_ln_norm = false;
  bool sub_ln = false;

  // Beyond the reference.
  Gate gate = Gate::kPolar;
  /// Scale the recurrence's input by 1 - a_t, so that the state is a running average (sigmoid gate
  /// only).
  bool normalize_input = false;
  /// Initial bias of the transition projection, spread evenly over [first, second] across heads
  /// (sigmoid gate only); default: torch's Linear initialisation.
  std::optional<std::pair<double, double>> transition_bias = std::nullopt;
};

/// The GateLoop Transformer: token embedding, `depth` blocks of a spatial mixer and a feed-forward,
/// projection to logits. Parameter names equal the reference's state_dict keys.
class TransformerImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error naming the option that does not fit (heads that do not divide, ...).
  explicit TransformerImpl(TransformerOptions options);

  /// ids (B, T) int64 -> logits (B, T, num_tokens).
  /// With `state`, continues from it and updates it: prefill with many steps, decode with one.
  /// `ablation` overrides the options' for this call. Calls its modules, always: for decoding at
  /// full speed see generation::Decoder.
  /// Throws c10::Error for ids that are not (B, T) int64 in [0, num_tokens) and for a state of
  /// another model or batch.
  torch::Tensor forward(const torch::Tensor& ids, TransformerState* state = nullptr,
                        std::optional<Ablation> ablation = std::nullopt);

  /// Mean next-token cross-entropy in nats of ids (B, T + 1): positions 0..T-1 predict 1..T.
  /// Computed in float32 where the logits are bfloat16 or float16. Throws as forward, and for T
  /// < 1.
  torch::Tensor loss(const torch::Tensor& ids, std::optional<Ablation> ablation = std::nullopt);

  const TransformerOptions& options() const { return options_; }

 private:
  TransformerOptions options_;
  torch::nn::Embedding token_emb_{nullptr};
  torch::nn::ModuleList layers_{nullptr};
  RMSNorm final_norm_{nullptr};  ///< pre-norm only: post-norm blocks leave a normalised output
  torch::nn::Linear to_logits_{nullptr};
};
TORCH_MODULE(Transformer);

}  // namespace gateloop::nn
