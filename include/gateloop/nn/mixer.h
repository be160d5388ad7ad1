#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "gateloop/model.h"

namespace gateloop::nn {

using model::Ablation;
using model::Gate;

/// What one layer carries from one call to the next. Default-constructed: the start of a sequence.
/// A sequence cut anywhere and carried through its state gives what one call gives.
/// Its tensors are detached: no gradient flows from one call into the one before it.
struct MixerState {
  /// GateLoop: (B, inner) complex with max heads, (B, heads, d, d) complex otherwise; real for the
  /// sigmoid gate and under the state_transition ablation. Undefined before the first call.
  torch::Tensor recurrence = {};
  /// Attention: (B, heads, capacity, dim_head), the first `position` entries in use; with a window
  /// the last of the steps before, at most window - 1.
  torch::Tensor keys = {}, values = {};
  /// The simple gate loop in front of the mixer: (B, dim).
  torch::Tensor simple_gate_loop = {};
  /// Time steps that the mixer has seen.
  std::int64_t position = 0;

  /// Memory held by the tensors above.
  std::int64_t bytes() const;
};

/// One entry per layer; empty: the start of a sequence.
using TransformerState = std::vector<MixerState>;

/// A layer that mixes along time: GateLoopedAttention or CausalFullAttention.
class SpatialMixer : public torch::nn::Module {
 public:
  /// x (B, T, dim) -> (B, T, dim). With `state`, continues from it and updates it.
  /// Throws c10::Error for an x of another shape and for a state of another layer or batch.
  virtual torch::Tensor forward(const torch::Tensor& x, Ablation ablation = {},
                                MixerState* state = nullptr) = 0;
};

}  // namespace gateloop::nn
