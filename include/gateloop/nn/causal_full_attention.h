#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "gateloop/nn/linear.h"
#include "gateloop/nn/mixer.h"

namespace gateloop::nn {

class RotaryEmbedding;
struct Places;

/// The reference's options and defaults.
struct CausalFullAttentionOptions {
  std::int64_t dim = 512;
  std::int64_t dim_head = 64;
  std::int64_t heads = 8;
  bool rotary_emb = false;
  bool add_swish_gating = false;
  bool data_dependent_rel_pos = false;
  double frac_gradient_data_dependent_rel_pos = 0.5;
  std::optional<bool> softmax_normalize = std::nullopt;  ///< default: not data_dependent_rel_pos
  /// Ours: each step attends to itself and the window - 1 steps before it; default: to all.
  std::optional<std::int64_t> window = std::nullopt;
};

/// Causal attention over all steps so far, at quadratic cost, or over a window, at linear cost:
///
///   o_i = Σ_{j ≤ i} w(q_i · k_j / √dim_head) v_j      w: softmax over j, or the identity
///
/// With data-dependent relative positions each pair of channels c of a head has a transition a_c of
/// its own step; q is scaled by max(Re(a_1 ... a_c), 1e-10) and k by the inverse. The paper's
/// product (arXiv 2311.01927, section 3.4) runs over the steps up to t; the reference's runs over
/// the channels up to c, within one step. Ours does as the reference's, so that its weights keep
/// their meaning. The floor decides the result for heads wider than about 60 channels. It does so
/// too wherever the product leaves the right half plane.
///
/// Parameters: to_qkv.0.weight, to_out.1.{weight,bias}, and by the options to_a.0.weight,
/// to_gates.0.weight, rotary_emb.freqs (not trained).
class CausalFullAttentionImpl : public SpatialMixer {
 public:
  /// Throws c10::Error naming a size that is not positive, or an odd dim_head where channels are
  /// paired (rotary_emb, data_dependent_rel_pos).
  explicit CausalFullAttentionImpl(const CausalFullAttentionOptions& options);
  CausalFullAttentionImpl(std::int64_t dim, const model::AttentionSpec& spec);

  torch::Tensor forward(const torch::Tensor& x, Ablation ablation = {}, MixerState* state = nullptr,
                        const Packing& packing = {}) override;

 private:
  double scale() const;
  torch::Tensor relative_scale(const torch::Tensor& x, Ablation ablation);
  void check_blocks(const Packing& packing) const;
  std::pair<torch::Tensor, torch::Tensor> with_steps_before(torch::Tensor k, torch::Tensor v,
                                                            MixerState* state,
                                                            std::int64_t all_steps,
                                                            const std::string& name) const;
  torch::Tensor attend(const torch::Tensor& q, const torch::Tensor& k,
                       const torch::Tensor& v) const;
  torch::Tensor weigh(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                      const torch::Tensor& visible) const;
  torch::Tensor attend_within(const torch::Tensor& q, const torch::Tensor& k,
                              const torch::Tensor& v, const Places& places, bool blocks) const;
  torch::Tensor attend_in_blocks(const torch::Tensor& q, const torch::Tensor& k,
                                 const torch::Tensor& v,
                                 const std::optional<torch::Tensor>& sequence = std::nullopt) const;

  std::int64_t dim_;
  model::AttentionSpec spec_;
  std::shared_ptr<RotaryEmbedding> rotary_emb_;
  Linear to_qkv_{nullptr}, to_a_{nullptr}, to_gates_{nullptr}, to_out_{nullptr};
};
TORCH_MODULE(CausalFullAttention);

}  // namespace gateloop::nn
