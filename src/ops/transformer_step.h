#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace gateloop::ops {

/// Weights of one layer; an undefined tensor stands for what the model has not. See
/// recurrence::TransformerLayer for their shapes.
struct LayerWeights {
  at::Tensor mixer_norm, mixer_norm_bias;
  at::Tensor qkv, transition, transition_bias, sub_norm, sub_norm_bias, gates, out;
  at::Tensor ff_norm, ff_norm_bias, expand, expand_bias, contract, contract_bias;
};

/// The members of LayerWeights in their order.
inline constexpr at::Tensor LayerWeights::*kLayerWeights[] = {
    &LayerWeights::mixer_norm,    &LayerWeights::mixer_norm_bias, &LayerWeights::qkv,
    &LayerWeights::transition,    &LayerWeights::transition_bias, &LayerWeights::sub_norm,
    &LayerWeights::sub_norm_bias, &LayerWeights::gates,           &LayerWeights::out,
    &LayerWeights::ff_norm,       &LayerWeights::ff_norm_bias,    &LayerWeights::expand,
    &LayerWeights::expand_bias,   &LayerWeights::contract,        &LayerWeights::contract_bias};

/// Weights of a GateLoop Transformer with max heads, and what tells one from another.
struct TransformerWeights {
  at::Tensor embedding;  // (tokens, D)
  std::vector<LayerWeights> layers;
  at::Tensor final_norm;  // (D); undefined with post-norm
  at::Tensor to_logits;   // (tokens, D)
  bool post_norm = false;
  bool sigmoid_gate = false;
  bool normalize_input = false;
};

/// Whether transformer_step() can take the place of the modules: nothing to differentiate, weights
/// as the kernel reads them, no autocast.
bool is_transformer_step(const at::Tensor& ids, const TransformerWeights& weights);

/// One token of one sequence: ids (1, 1) in [0, tokens), states a tensor (1, I) a layer, or none at
/// the start -> logits (1, 1, tokens) and new states. Everything in between is float32 or wider.
/// Decoding one sequence is bound by reading the weights once; as single operators, what lies
/// between the products took a third of the time. Throws c10::Error naming the weight or the state
/// that does not fit.
std::tuple<at::Tensor, std::vector<at::Tensor>> transformer_step(
    const at::Tensor& ids, const TransformerWeights& weights,
    const std::vector<at::Tensor>& states);

}  // namespace gateloop::ops
