#include "ops/transformer_step.h"

#include <torch/library.h>

#include <iterator>

namespace gateloop::ops {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

/// embedding, final_norm, to_logits; then those of kLayerWeights, layer by layer.
TransformerWeights unpack(const OptionalTensors& flat) {
  constexpr std::size_t kModel = 3, kLayer = std::size(kLayerWeights);
  TORCH_CHECK_VALUE(flat.size() >= kModel && (flat.size() - kModel) % kLayer == 0,
                    "_transformer_step: weights must be ", kModel, " tensors and ", kLayer,
                    " a layer, got ", flat.size());
  std::size_t next = 0;
  const auto take = [&] { return flat.get(next++).value_or(at::Tensor()); };
  TransformerWeights weights;
  weights.embedding = take();
  weights.final_norm = take();
  weights.to_logits = take();
  TORCH_CHECK_VALUE(weights.embedding.defined() && weights.embedding.dim() == 2,
                    "_transformer_step: the embedding must be (tokens, D)");
  while (next < flat.size()) {
    LayerWeights& layer = weights.layers.emplace_back();
    for (const auto weight : kLayerWeights) layer.*weight = take();
  }
  return weights;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> step(const at::Tensor& ids,
                                                     const OptionalTensors& flat,
                                                     const std::vector<at::Tensor>& states,
                                                     bool post_norm, bool sigmoid_gate,
                                                     bool normalize_input) {
  TransformerWeights weights = unpack(flat);
  weights.post_norm = post_norm;
  weights.sigmoid_gate = sigmoid_gate;
  weights.normalize_input = normalize_input;
  TORCH_CHECK_VALUE(is_transformer_step(ids, weights),
                    "_transformer_step: ids must be (1, 1) and weights contiguous, on the CPU and "
                    "of one floating dtype, without gradients or autocast");
  return transformer_step(ids, weights, states);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "_transformer_step(Tensor ids, Tensor?[] weights, Tensor[] states, bool post_norm, bool "
      "sigmoid_gate, bool normalize_input) -> (Tensor logits, Tensor[] states)",
      step);
}

}  // namespace gateloop::ops
