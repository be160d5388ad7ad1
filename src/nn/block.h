#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "gateloop/nn/feed_forward.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"
#include "gateloop/nn/simple_gate_loop_layer.h"

namespace gateloop::nn {

/// What flows from residual connection to residual connection.
struct Stream {
  torch::Tensor x;      ///< (B, T, dim)
  torch::Tensor added;  ///< what a layer has yet to add to x; undefined: nothing
  torch::Tensor input;  ///< behind a post-norm: x as the next layer reads it; undefined: x itself

  const torch::Tensor& read() const { return input.defined() ? input : x; }
  /// Adds what is to be added.
  void settle() {
    if (added.defined()) *this = {.x = x + added, .added = {}, .input = {}};
  }
};

/// The norm of the stream, in which nothing is left to add. Without a norm: the stream.
torch::Tensor normalise(Stream& stream, const RMSNorm& norm);

/// A residual connection and its norm around a layer `fn`: fn(RMSNorm(x)) + x, or with post-norm
/// LayerNorm(fn(x) + x). Children: fn, norm.
class Residual : public torch::nn::Module {
 public:
  Residual(std::int64_t dim, std::shared_ptr<torch::nn::Module> fn, bool post_norm);

  /// `call` runs the layer, with its further arguments.
  template <typename Call>
  void forward(Stream& stream, const Call& call) {
    if (pre_norm_) {
      stream.added = call(normalise(stream, pre_norm_));
    } else {
      stream.settle();
      finish(stream, call(stream.read()));
    }
  }

 private:
  void finish(Stream& stream, const torch::Tensor& y);

  RMSNorm pre_norm_{nullptr};
  torch::nn::LayerNorm post_norm_{nullptr};
};

/// One layer of the Transformer: a simple gate loop and a spatial mixer, each where the spec has
/// one, then a feed-forward. Children: 2, 0, 1, the reference's two under its names.
class Block : public torch::nn::Module {
 public:
  Block(std::int64_t dim, const model::LayerSpec& spec, bool post_norm);

  void forward(Stream& stream, Ablation ablation, MixerState* state, const Packing& packing);

 private:
  SimpleGateLoopLayer simple_gate_loop_{nullptr};
  std::shared_ptr<SpatialMixer> mixer_;
  FeedForward feed_forward_;
  std::shared_ptr<Residual> around_mixer_, around_feed_forward_;
};

}  // namespace gateloop::nn
