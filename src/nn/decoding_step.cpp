#include "nn/decoding_step.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace gateloop::nn {

DecodingStep::DecodingStep(const model::ModelSpec& spec, const LayerTensors& tensors) {
  if (spec.layers.empty() || spec.tie_embeddings || spec.ablation != Ablation()) return;
  const auto& first = spec.layers.front();
  const auto* mixer = std::get_if<model::GateLoopSpec>(&first.mixer);
  if (!mixer || !mixer->has_max_heads() || mixer->joint_kv || first.simple_gate_loop) return;
  for (const auto& layer : spec.layers) {
    if (layer != first) return;
  }

  const auto find = [&](const std::string& name) { return tensors.find(name); };
  auto& weights = weights_.emplace();
  weights.post_norm = spec.post_norm;
  weights.sigmoid_gate = mixer->gate == model::Gate::kSigmoid;
  weights.normalize_input = mixer->normalize_input;
  weights.embedding = find("token_emb.weight");
  weights.final_norm = find("to_logits.0.gamma");
  weights.to_logits = find(spec.post_norm ? "to_logits.weight" : "to_logits.1.weight");
  const std::string gain = spec.post_norm ? "norm.weight" : "norm.gamma";
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const std::string layer = "layers." + std::to_string(i);
    const std::string around = layer + ".0.", mix = around + "fn.";
    const std::string feed = layer + ".1.", forward = feed + "fn.";
    weights.layers.push_back({.mixer_norm = find(around + gain),
                              .mixer_norm_bias = find(around + "norm.bias"),
                              .qkv = find(mix + "to_qkv.weight"),
                              .transition = find(mix + "to_a.0.weight"),
                              .transition_bias = find(mix + "to_a.0.bias"),
                              .sub_norm = find(mix + "maybe_sub_ln.weight"),
                              .sub_norm_bias = find(mix + "maybe_sub_ln.bias"),
                              .gates = find(mix + "to_gates.0.weight"),
                              .out = find(mix + "to_out.weight"),
                              .ff_norm = find(feed + gain),
                              .ff_norm_bias = find(feed + "norm.bias"),
                              .expand = find(forward + "0.weight"),
                              .expand_bias = find(forward + "0.bias"),
                              .contract = find(forward + "2.weight"),
                              .contract_bias = find(forward + "2.bias")});
  }
}

bool DecodingStep::takes(const torch::Tensor& ids) const {
  return weights_ && ops::is_transformer_step(ids, *weights_);
}

torch::Tensor DecodingStep::operator()(const torch::Tensor& ids, TransformerState& state) const {
  state.resize(weights_->layers.size());
  std::vector<torch::Tensor> states;
  for (const MixerState& layer : state) states.push_back(layer.recurrence);
  auto [logits, next] = ops::transformer_step(ids, *weights_, states);
  for (std::size_t i = 0; i < state.size(); ++i) {
    state[i].recurrence = std::move(next[i]);
    ++state[i].position;
  }
  return logits;
}

}  // namespace gateloop::nn
