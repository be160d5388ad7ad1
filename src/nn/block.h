#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "gateloop/nn/feed_forward.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"

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

/// One layer of the Transformer: a spatial mixer, then a feed-forward. Children: 0, 1.
class Block : public torch::nn::Module {
 public:
  Block(std::int64_t dim, std::shared_ptr<SpatialMixer> mixer, FeedForward feed_forward,
        bool post_norm);

  /// x (B, T, dim) -> (B, T, dim).
  torch::Tensor forward(const torch::Tensor& x, Ablation ablation, MixerState* state);

 private:
  std::shared_ptr<SpatialMixer> mixer_;
  FeedForward feed_forward_;
  std::shared_ptr<Residual> around_mixer_, around_feed_forward_;
};

}  // namespace gateloop::nn
