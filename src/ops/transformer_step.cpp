#include "ops/transformer_step.h"

#include <torch/library.h>

namespace gateloop::ops {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

/// embedding, final_norm, to_logits; then the members of LayerWeights in their order, layer by
/// layer.
TransformerWeights unpack(const OptionalTensors& flat) {
  constexpr std::size_t kModel = 3, kLayer = 15;
  TORCH_CHECK_VALUE(flat.size() >= kModel && (flat.size() - kModel) % kLayer == 0,
                    "_transformer_step: weights must be ", kModel, " tensors and ", kLayer,
                    " a layer, got ", flat.size());
  std::size_t next = 0;
  const auto take = [&] { return flat.get(next++).value_or(at::Tensor()); };
  TransformerWeights weights;
  weights.embedding = take();
  weights.final_norm = take();
  weights.to_logits = take();
  while (next < flat.size()) {
    weights.layers.push_back({take(), take(), take(), take(), take(), take(), take(), take(),
                              take(), take(), take(), take(), take(), take(), take()});
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
  TORCH_CHECK_VALUE(
      is_transformer_step(ids, weights),
      "_transformer_step: ids must be (1, 1) and weights contiguous, on the CPU and of "
      "one floating dtype, without gradients or autocast");
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
