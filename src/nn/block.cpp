#include "nn/block.h"

#include <utility>

namespace gateloop::nn {

Residual::Residual(std::int64_t dim, std::shared_ptr<torch::nn::Module> fn, bool post_norm) {
  register_module("fn", std::move(fn));
  if (post_norm) {
    post_norm_ = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({dim})));
  } else {
    pre_norm_ = register_module("norm", RMSNorm(dim));
  }
}

Block::Block(std::int64_t dim, std::shared_ptr<SpatialMixer> mixer, FeedForward feed_forward,
             bool post_norm)
    : mixer_(std::move(mixer)), feed_forward_(std::move(feed_forward)) {
  around_mixer_ = register_module("0", std::make_shared<Residual>(dim, mixer_, post_norm));
  around_feed_forward_ =
      register_module("1", std::make_shared<Residual>(dim, feed_forward_.ptr(), post_norm));
}

torch::Tensor Block::forward(const torch::Tensor& x, Ablation ablation, MixerState* state) {
  const auto mixed = around_mixer_->forward(
      x, [&](const torch::Tensor& t) { return mixer_->forward(t, ablation, state); });
  return around_feed_forward_->forward(mixed,
                                       [&](const torch::Tensor& t) { return feed_forward_(t); });
}

}  // namespace gateloop::nn
