#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "gateloop/nn/feed_forward.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"
#include "gateloop/nn/simple_gate_loop_layer.h"

namespace gateloop::nn {

/// A residual connection and its norm around a layer `fn`: fn(RMSNorm(x)) + x, or with post-norm
/// LayerNorm(fn(x) + x). Children: fn, norm.
class Residual : public torch::nn::Module {
 public:
  Residual(std::int64_t dim, std::shared_ptr<torch::nn::Module> fn, bool post_norm);

  /// `call` runs the layer, with its further arguments.
  template <typename Call>
  torch::Tensor forward(const torch::Tensor& x, const Call& call) {
    return pre_norm_ ? call(pre_norm_(x)) + x : post_norm_(call(x) + x);
  }

 private:
  RMSNorm pre_norm_{nullptr};
  torch::nn::LayerNorm post_norm_{nullptr};
};

/// One layer of the Transformer: a simple gate loop where asked for, a spatial mixer but in layers
/// without, then a feed-forward. Children: 2, 0, 1, the reference's two under its names.
class Block : public torch::nn::Module {
 public:
  Block(std::int64_t dim, const model::LayerSpec& spec, bool post_norm);

  /// x (B, T, dim) -> (B, T, dim).
  torch::Tensor forward(const torch::Tensor& input, Ablation ablation, MixerState* state,
                        const Packing& packing);

 private:
  SimpleGateLoopLayer simple_gate_loop_{nullptr};
  std::shared_ptr<SpatialMixer> mixer_;
  FeedForward feed_forward_;
  std::shared_ptr<Residual> around_mixer_, around_feed_forward_;
};

}  // namespace gateloop::nn
