#include "gateloop/nn/transformer.h"

#include <memory>
#include <utility>

#include "gateloop/nn/causal_full_attention.h"
#include "gateloop/nn/feed_forward.h"
#include "nn/block.h"
#include "nn/common.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kTransformer = "Transformer";

std::shared_ptr<SpatialMixer> make_mixer(const TransformerOptions& o) {
  if (!o.use_gate_looped_attn) {
    return std::make_shared<CausalFullAttentionImpl>(CausalFullAttentionOptions{
        .dim = o.dim,
        .dim_head = o.dim_head,
        .heads = o.heads,
        .rotary_emb = o.rotary_emb,
        .add_swish_gating = o.attn_add_swish_gating,
        .data_dependent_rel_pos = o.data_dependent_rel_pos,
        .frac_gradient_data_dependent_rel_pos = o.frac_gradient_state_transition,
        .softmax_normalize = o.attn_softmax_normalize});
  }
  return std::make_shared<GateLoopedAttentionImpl>(
      GateLoopedAttentionOptions{.dim = o.dim,
                                 .heads = o.gate_loop_heads,
                                 .dim_inner = o.dim_gate_looped_attn,
                                 .checkpoint_gate_looped_attn = o.checkpoint_gate_looped_attn,
                                 .add_swish_gating = o.attn_add_swish_gating,
                                 .sub_ln = o.sub_ln,
                                 .frac_gradient_state_transition = o.frac_gradient_state_transition,
                                 .gate = o.gate,
                                 .normalize_input = o.normalize_input,
                                 .transition_bias = o.transition_bias});
}

void check_ids(const Tensor& ids, std::int64_t num_tokens) {
  TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == torch::kLong, kTransformer,
              ": ids must be (B, T) int64, got ", ids.scalar_type(), " of shape ", ids.sizes());
  // On an accelerator reading the bounds would stall the queue; its embedding kernel asserts.
  if (!ids.is_cpu() || ids.numel() == 0) return;
  const auto [low, high] = ids.aminmax();
  const auto lowest = low.item<std::int64_t>(), highest = high.item<std::int64_t>();
  TORCH_CHECK(lowest >= 0 && highest < num_tokens, kTransformer, ": ids must be in [0, ",
              num_tokens, "), got ", lowest < 0 ? lowest : highest);
}

}  // namespace

TransformerImpl::TransformerImpl(TransformerOptions options) : options_(std::move(options)) {
  const auto& o = options_;
  check_positive(kTransformer, "num_tokens", o.num_tokens);
  check_positive(kTransformer, "dim", o.dim);
  TORCH_CHECK(o.depth >= 0, kTransformer, ": depth must not be negative, got ", o.depth);

  token_emb_ = register_module("token_emb", torch::nn::Embedding(o.num_tokens, o.dim));
  layers_ = register_module("layers", torch::nn::ModuleList());
  for (std::int64_t i = 0; i < o.depth; ++i) {
    auto mixer = make_mixer(o);
    layers_->push_back(std::make_shared<Block>(o.dim, std::move(mixer),
                                               FeedForward(o.dim, o.ff_mult), o.post_ln_norm));
  }
  to_logits_ = linear(o.dim, o.num_tokens, false);
  if (o.post_ln_norm) {
    register_module("to_logits", to_logits_);
  } else {
    final_norm_ = RMSNorm(o.dim);
    register_module("to_logits", torch::nn::Sequential(final_norm_, to_logits_));
  }
}

Tensor TransformerImpl::forward(const Tensor& ids, TransformerState* state,
                                std::optional<Ablation> ablation) {
  check_ids(ids, options_.num_tokens);
  if (state && state->empty()) state->resize(layers_->size());
  TORCH_CHECK(!state || state->size() == layers_->size(), kTransformer,
              ": state must have one entry for each of ", layers_->size(), " layers, got ",
              state->size());
  const auto active = ablation.value_or(Ablation{
      .complex = options_.ablate_complex, .state_transition = options_.ablate_state_transition});

  auto x = token_emb_(ids);
  for (std::size_t i = 0; i < layers_->size(); ++i) {
    x = layers_->at<Block>(i).forward(x, active, state ? &(*state)[i] : nullptr);
  }
  if (final_norm_) x = final_norm_(x);
  return project(to_logits_, x);
}

Tensor TransformerImpl::loss(const Tensor& ids, std::optional<Ablation> ablation) {
  TORCH_CHECK(ids.dim() == 2 && ids.size(1) >= 2, kTransformer,
              ": loss needs ids of shape (B, T + 1) with T >= 1, got ", ids.sizes());
  const auto time = ids.size(1) - 1;
  auto logits = forward(ids.narrow(1, 0, time), nullptr, ablation).flatten(0, 1);
  // Sums of exponentials over the vocabulary lose too much in 8 or 11 bits.
  if (at::isReducedFloatingType(logits.scalar_type())) logits = logits.to(torch::kFloat);
  return at::cross_entropy_loss(logits, ids.narrow(1, 1, time).flatten());
}

}  // namespace gateloop::nn
