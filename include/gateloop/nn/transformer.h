#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "gateloop/model.h"
#include "gateloop/nn/linear.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"

namespace gateloop::nn {

using TransformerOptions = model::ModelOptions;

/// The GateLoop Transformer: token embedding, layers of a spatial mixer and a feed-forward,
/// projection to logits. Parameter names equal the reference's state_dict keys; all of them are in
/// model::weight_table(spec()).
class TransformerImpl : public torch::nn::Module {
 public:
  /// Throws c10::Error naming the option that does not fit (heads that do not divide, ...).
  explicit TransformerImpl(TransformerOptions options);

  /// ids (B, T) int64 -> logits (B, T, num_tokens).
  /// With `state`, continues from it and updates it: prefill with many steps, decode with one.
  /// `ablation` overrides the options' for this call. Calls its modules, always: for decoding at
  /// full speed see runtime_model().
  /// `packing`: sequences of different lengths; attention then takes no state. A block of ids over
  /// a time group gives its block of the logits.
  /// Throws c10::Error for ids that are not (B, T) int64 in [0, num_tokens). Also for a state of
  /// another model or batch, and for a packing that does not fit.
  torch::Tensor forward(const torch::Tensor& ids, TransformerState* state = nullptr,
                        std::optional<Ablation> ablation = std::nullopt,
                        const Packing& packing = {});

  /// Mean next-token cross-entropy in nats of ids (B, T + 1): positions 0..T-1 predict 1..T.
  /// Computed in float32 where the logits are bfloat16 or float16. Throws as forward, and for T
  /// < 1. Of packed or padded sequences each token but the first is predicted from those before it
  /// in its sequence; where no sequence has two, the mean of nothing is NaN. Over a time group ids
  /// are the block (B, T) of a process, and T may be 0. The last is given the first of the next
  /// block. The sum over processes of the results is the mean loss, that of gradients its gradient.
  torch::Tensor loss(const torch::Tensor& ids, std::optional<Ablation> ablation = std::nullopt,
                     const Packing& packing = {});

  /// Whether a pass with gradients and without a state keeps of each layer only what it reads. The
  /// backward pass then runs the layer again: long sequences in less memory, for one more forward
  /// pass. Off at first; the bits are the same. Then backward() alone has the gradients:
  /// torch::autograd::grad and second derivatives throw c10::NotImplementedError.
  void set_checkpoint_blocks(bool on) { checkpoint_blocks_ = on; }
  bool checkpoint_blocks() const { return checkpoint_blocks_; }

  const TransformerOptions& options() const { return options_; }
  const model::ModelSpec& spec() const { return spec_; }

 private:
  TransformerOptions options_;
  model::ModelSpec spec_;
  bool checkpoint_blocks_ = false;
  torch::nn::Embedding token_emb_{nullptr};
  torch::nn::ModuleList layers_{nullptr};
  RMSNorm final_norm_{nullptr};  ///< pre-norm only: post-norm blocks leave a normalised output
  Linear to_logits_{nullptr};    ///< none with tied embeddings
};
TORCH_MODULE(Transformer);

}  // namespace gateloop::nn
