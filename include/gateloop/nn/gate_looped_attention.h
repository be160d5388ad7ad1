#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "gateloop/nn/linear.h"
#include "gateloop/nn/mixer.h"

namespace gateloop::nn {

/// The reference's options and defaults, then ours (see model::GateLoopSpec).
struct GateLoopedAttentionOptions {
  std::int64_t dim = 512;
  std::optional<std::int64_t> heads = std::nullopt;      ///< default: max heads (dim_inner)
  std::optional<std::int64_t> dim_inner = std::nullopt;  ///< default: dim
  bool checkpoint_gate_looped_attn = true;
  bool add_swish_gating = true;
  bool sub_ln = false;
  double frac_gradient_state_transition = 0.9;

  Gate gate = Gate::kPolar;
  NormalizeInput normalize_input = NormalizeInput::kNone;
  std::optional<std::pair<double, double>> transition_bias = std::nullopt;
  bool joint_kv = false;
  std::optional<std::int64_t> dim_key = std::nullopt;  ///< of all heads' keys; default: dim_inner
  bool per_key_transitions = false;
  FeatureMap feature_map = FeatureMap::kNone;
  std::optional<std::pair<double, double>> phase_bias = std::nullopt;
};

/// GateLoop as a spatial mixer (arXiv 2311.01927, section 3.2): with K = dim_key / heads, V =
/// dim_inner / heads and a transition a_t for each head, or for each of its keys,
///
///   S_t = a_t S_{t-1} + k_t^T v_t   (K, V)        y_t = q_t Re(S_t)   (V)
///
/// then sub-LN, swish gating and the output projection. With max heads (K = V = 1) the whole
/// recurrence is one fused operator. It reads q, k, v and z in place. With the magnitude_phase gate
/// it is a scan of computed transitions instead. Wider heads are gate_loop(). With joint_kv the
/// projection gives q and kv, (2 dim_inner) channels.
///
/// Parameters: to_qkv.weight (2 dim_key + dim_inner, dim), to_a.0.{weight,bias}, of every
/// transition in turn the numbers that make it; and by the options to_gates.0.weight,
/// maybe_sub_ln.{weight,bias}, to_out.weight.
class GateLoopedAttentionImpl : public SpatialMixer {
 public:
  /// Throws c10::Error naming the option that does not fit, see model::check().
  explicit GateLoopedAttentionImpl(const GateLoopedAttentionOptions& options);
  GateLoopedAttentionImpl(std::int64_t dim, const model::GateLoopSpec& spec);

  torch::Tensor forward(const torch::Tensor& x, Ablation ablation = {}, MixerState* state = nullptr,
                        const Packing& packing = {}) override;

 private:
  torch::Tensor transition(const torch::Tensor& x, Ablation ablation);
  torch::Tensor scaled(const torch::Tensor& input, const torch::Tensor& z) const;
  torch::Tensor max_heads(const torch::Tensor& x, Ablation ablation, MixerState* state,
                          const Packing& packing);
  torch::Tensor wide_heads(const torch::Tensor& x, Ablation ablation, MixerState* state,
                           const Packing& packing);

  std::int64_t dim_;
  model::GateLoopSpec spec_;
  Linear to_qkv_{nullptr}, to_a_{nullptr}, to_gates_{nullptr}, to_out_{nullptr};
  torch::nn::LayerNorm sub_ln_{nullptr};
};
TORCH_MODULE(GateLoopedAttention);

}  // namespace gateloop::nn
