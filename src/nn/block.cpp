#include "nn/block.h"

#include <utility>

#include "gateloop/nn/causal_full_attention.h"
#include "gateloop/nn/gate_looped_attention.h"
#include "ops/residual_norm.h"

namespace gateloop::nn {
namespace {

struct MakeMixer {
  std::int64_t dim;
  std::shared_ptr<SpatialMixer> operator()(const model::GateLoopSpec& spec) const {
    return std::make_shared<GateLoopedAttentionImpl>(dim, spec);
  }
  std::shared_ptr<SpatialMixer> operator()(const model::AttentionSpec& spec) const {
    return std::make_shared<CausalFullAttentionImpl>(dim, spec);
  }
  std::shared_ptr<SpatialMixer> operator()(const model::NoMixer&) const { return nullptr; }
};

std::shared_ptr<SpatialMixer> make_mixer(std::int64_t dim, const model::MixerSpec& spec) {
  return std::visit(MakeMixer{dim}, spec);
}

}  // namespace

Residual::Residual(std::int64_t dim, std::shared_ptr<torch::nn::Module> fn, bool post_norm) {
  register_module("fn", std::move(fn));
  if (post_norm) {
    post_norm_ = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({dim})));
  } else {
    pre_norm_ = register_module("norm", RMSNorm(dim));
  }
}

void Residual::finish(Stream& stream, const torch::Tensor& y) {
  const auto [x, input] =
      ops::add_then_layer_norm(stream.x, y, post_norm_->weight, post_norm_->bias);
  stream = {.x = x, .added = {}, .input = input};
}

torch::Tensor normalise(Stream& stream, const RMSNorm& norm) {
  if (!norm) {
    stream.settle();
    return stream.x;
  }
  const auto [x, input] = ops::add_then_rms_norm(stream.x, stream.added, norm->gamma());
  stream = {.x = x, .added = {}, .input = {}};
  return input;
}

Block::Block(std::int64_t dim, const model::LayerSpec& spec, bool post_norm)
    : mixer_(make_mixer(dim, spec.mixer)), feed_forward_(dim, spec.ff_mult) {
  if (mixer_) {
    around_mixer_ = register_module("0", std::make_shared<Residual>(dim, mixer_, post_norm));
  }
  around_feed_forward_ =
      register_module("1", std::make_shared<Residual>(dim, feed_forward_.ptr(), post_norm));
  if (const auto& simple = spec.simple_gate_loop) {
    simple_gate_loop_ = register_module(
        "2", SimpleGateLoopLayer(dim, SimpleGateLoopLayerOptions{.prenorm = simple->prenorm,
                                                                 .post_ln = simple->post_ln}));
  }
}

void Block::forward(Stream& stream, Ablation ablation, MixerState* state, const Packing& packing) {
  if (simple_gate_loop_) {
    stream.added =
        simple_gate_loop_->forward_normalised(normalise(stream, simple_gate_loop_->prenorm()),
                                              state ? &state->simple_gate_loop : nullptr, packing);
  }
  if (mixer_) {
    around_mixer_->forward(stream, [&](const torch::Tensor& x) {
      return mixer_->forward(x, ablation, state, packing);
    });
  }
  around_feed_forward_->forward(stream, [&](const torch::Tensor& x) { return feed_forward_(x); });
}

}  // namespace gateloop::nn
