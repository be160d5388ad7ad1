#pragma once

#include <optional>

#include "gateloop/nn/transformer.h"
#include "nn/layer_tensors.h"
#include "ops/transformer_step.h"

namespace gateloop::nn {

/// One token of one sequence through a whole model as one operator, past its modules.
class DecodingStep {
 public:
  /// `tensors`: of a model of this description. They are shared, not copied.
  DecodingStep(const model::ModelSpec& spec, const LayerTensors& tensors);

  /// Whether the operator gives what the modules give: one token, equal layers with max heads, no
  /// ablation, tensors of one floating dtype on the CPU, neither gradients nor autocast.
  bool takes(const torch::Tensor& ids) const;

  /// ids (1, 1) int64 -> logits (1, 1, num_tokens), where takes(ids). Continues from `state` and
  /// updates it. Throws c10::Error for an id or a state that does not fit.
  torch::Tensor operator()(const torch::Tensor& ids, TransformerState& state) const;

 private:
  std::optional<ops::TransformerWeights> weights_;
};

}  // namespace gateloop::nn
