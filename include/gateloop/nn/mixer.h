#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gateloop/model.h"

namespace gateloop::nn {

using model::Ablation;
using model::FeatureMap;
using model::Gate;
using model::NormalizeInput;

/// What one layer carries from one call to the next. Default-constructed: the start of a sequence.
/// A sequence cut anywhere and carried through its state gives what one call gives.
/// Its tensors are detached: no gradient flows from one call into the one before it.
struct MixerState {
  /// GateLoop: (B, inner) complex with max heads, (B, heads, K, V) complex otherwise; real for the
  /// sigmoid gate and under the state_transition ablation. Undefined before the first call.
  torch::Tensor recurrence = {};
  /// Attention: (B, heads, capacity, dim_head), the first `position` entries in use; with a window
  /// the last of the steps before, at most window - 1.
  torch::Tensor keys = {}, values = {};
  /// The simple gate loop in front of the mixer: (B, dim).
  torch::Tensor simple_gate_loop = {};
  /// Time steps that the mixer has read.
  std::int64_t position = 0;

  /// Memory held by the tensors above.
  std::int64_t bytes() const;
};

/// One entry per layer; empty: the start of a sequence.
using TransformerState = std::vector<MixerState>;

/// Sequences of different lengths in one batch, see gateloop/ops.h; at most one of the first two.
/// Each of N packed sequences has a state of its own: the rows of a MixerState are then N. The
/// outputs at padding have no meaning.
struct Packing {
  std::optional<torch::Tensor> cu_seqlens = std::nullopt;  ///< (N + 1), int32 or int64
  std::optional<torch::Tensor> mask = std::nullopt;        ///< (B, T), bool, false at padding
  /// Name of the c10d group whose processes hold a block of time each, see
  /// gateloop/distributed_ops.h; empty: all steps are here. A MixerState is that of the whole
  /// sequence: the same on every process, before the blocks and after them. Attention needs a
  /// window, whose keys and values come from the blocks before, and no mask.
  std::string time_group = {};
};

/// A layer that mixes along time: GateLoopedAttention or CausalFullAttention.
class SpatialMixer : public torch::nn::Module {
 public:
  /// x (B, T, dim) -> (B, T, dim). With `state`, continues from it and updates it.
  /// `packing`: of attention without a state.
  /// Throws c10::Error for an x of another shape and for a state of another layer or batch. Also
  /// for a packing that does not fit.
  virtual torch::Tensor forward(const torch::Tensor& x, Ablation ablation = {},
                                MixerState* state = nullptr, const Packing& packing = {}) = 0;
};

}  // namespace gateloop::nn
