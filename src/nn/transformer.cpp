#include "gateloop/nn/transformer.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "nn/block.h"
#include "nn/common.h"
#include "nn/packing.h"
#include "nn/recompute.h"
#include "ops/linear.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kTransformer = "Transformer";

void check_ids(const Tensor& ids, std::int64_t num_tokens) {
  TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == torch::kLong, kTransformer,
              ": ids must be (B, T) int64, got ", ids.scalar_type(), " of shape ", ids.sizes());
  // On an accelerator reading the bounds would stall the queue; its embedding kernel asserts.
  if (!ids.is_cpu() || ids.numel() == 0) return;
  const auto [low, high] = ids.aminmax();
  const auto lowest = low.item<std::int64_t>(), highest = high.item<std::int64_t>();
  TORCH_CHECK(lowest >= 0 && highest < num_tokens, kTransformer, ": ids must be in [0, ",
              num_tokens, "), got ", lowest < 0 ? lowest : highest);
}

/// Sums of exponentials over the vocabulary lose too much in 8 or 11 bits.
Tensor widened(const Tensor& logits) {
  return at::isReducedFloatingType(logits.scalar_type()) ? logits.to(torch::kFloat) : logits;
}

/// Of the sum alone: what a layer has yet to add is added.
Stream stream_of(const torch::autograd::variable_list& tensors) {
  return {.x = tensors[0], .added = {}, .input = tensors.size() > 1 ? tensors[1] : Tensor()};
}

torch::autograd::variable_list tensors_of(Stream stream) {
  stream.settle();
  if (stream.read().is_same(stream.x)) return {stream.x};
  return {stream.x, stream.input};
}

/// Moves the stream through a layer that runs again in the backward pass.
void checkpoint(const std::shared_ptr<Block>& block, Stream& stream, Ablation ablation,
                const Packing& packing) {
  const auto run = [block, ablation, packing](const torch::autograd::variable_list& inputs) {
    Stream inside = stream_of(inputs);
    block->forward(inside, ablation, nullptr, packing);
    return tensors_of(inside);
  };
  stream = stream_of(recomputed_backward(run, tensors_of(stream)));
}

bool trains(const torch::nn::Module& module, const Stream& stream) {
  const auto takes_part = [](const Tensor& t) { return t.requires_grad(); };
  const auto parameters = module.parameters();
  return takes_part(stream.x) || std::any_of(parameters.begin(), parameters.end(), takes_part);
}

}  // namespace

TransformerImpl::TransformerImpl(TransformerOptions options)
    : options_(std::move(options)),
      spec_(as_torch_error([&] { return model::resolve(options_); })) {
  const auto dim = spec_.dim, num_tokens = spec_.num_tokens;
  token_emb_ = register_module("token_emb", torch::nn::Embedding(num_tokens, dim));
  if (spec_.tie_embeddings) {
    // Logits of unit variance at the start: what they multiply is normalised.
    const torch::NoGradGuard no_grad;
    token_emb_->weight.normal_(0, 1 / std::sqrt(static_cast<double>(dim)));
  }
  layers_ = register_module("layers", torch::nn::ModuleList());
  for (const auto& layer : spec_.layers) {
    layers_->push_back(std::make_shared<Block>(dim, layer, spec_.post_norm));
  }
  if (!spec_.tie_embeddings) to_logits_ = linear(dim, num_tokens, false);
  if (!spec_.post_norm) {
    final_norm_ = RMSNorm(dim);
    torch::nn::Sequential tail(final_norm_);
    if (to_logits_) tail->push_back(to_logits_);
    register_module("to_logits", tail);
  } else if (to_logits_) {
    register_module("to_logits", to_logits_);
  }
}

Tensor TransformerImpl::forward(const Tensor& ids, TransformerState* state,
                                std::optional<Ablation> ablation, const Packing& packing) {
  check_ids(ids, spec_.num_tokens);
  check_packing(kTransformer, "ids", ids, packing);
  if (state && state->empty()) state->resize(layers_->size());
  TORCH_CHECK(!state || state->size() == layers_->size(), kTransformer,
              ": state must have one entry for each of ", layers_->size(), " layers, got ",
              state->size());
  const auto active = ablation.value_or(spec_.ablation);

  Stream stream{.x = token_emb_(ids), .added = {}, .input = {}};
  const bool checkpoints = checkpoint_blocks_ && !state && torch::GradMode::is_enabled();
  for (std::size_t i = 0; i < layers_->size(); ++i) {
    const auto block = layers_->ptr<Block>(i);
    if (checkpoints && trains(*block, stream)) {
      checkpoint(block, stream, active, packing);
    } else {
      block->forward(stream, active, state ? &(*state)[i] : nullptr, packing);
    }
  }
  const auto x = final_norm_ ? normalise(stream, final_norm_) : stream.read();
  return to_logits_ ? to_logits_(x) : ops::linear(x, token_emb_->weight);
}

Tensor TransformerImpl::loss(const Tensor& ids, std::optional<Ablation> ablation,
                             const Packing& packing) {
  const bool sharded = !packing.time_group.empty();
  TORCH_CHECK(ids.dim() == 2 && (sharded || ids.size(1) >= 2), kTransformer,
              ": loss needs ids of shape (B, T + 1) with T >= 1, got ", ids.sizes());
  if (sharded) {
    const auto logits = widened(forward(ids, nullptr, ablation, packing)).flatten(0, 1);
    const auto [next, count] = next_tokens_over_group(ids, packing);
    return at::cross_entropy_loss(logits, next.flatten(), {}, at::Reduction::Sum) / count;
  }
  const auto time = ids.size(1) - 1;
  const bool whole = !packing.cu_seqlens && !packing.mask;
  auto logits = forward(whole ? ids.narrow(1, 0, time) : ids, nullptr, ablation, packing);
  logits = widened(logits.narrow(1, 0, time).flatten(0, 1));
  return at::cross_entropy_loss(logits, next_tokens(ids, packing).flatten());
}

}  // namespace gateloop::nn
