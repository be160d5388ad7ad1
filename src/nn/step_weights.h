#pragma once

#include <memory>

#include "gateloop/nn/transformer.h"
#include "ops/transformer_step.h"

namespace gateloop::nn {

/// The model's parameters, shared with it, as ops::transformer_step() reads them; null where its
/// layers are none that a step knows: attention, or heads wider than one channel.
std::shared_ptr<const ops::TransformerWeights> step_weights(const TransformerOptions& options,
                                                            const torch::nn::Module& model);

}  // namespace gateloop::nn
