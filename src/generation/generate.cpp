#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/generation.h"
#include "nn/decoding_products.h"
#include "nn/decoding_step.h"
#include "nn/layer_tensors.h"

namespace gateloop::generation {
namespace {

std::string shape_of(const torch::Tensor& tensor) {
  std::string text = "(";
  for (const auto size : tensor.sizes())
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

}  // namespace

struct Decoder::Weights {
  explicit Weights(const nn::TransformerImpl& model)
      : tensors(model), step(model.spec(), tensors) {}

  nn::LayerTensors tensors;
  nn::DecodingStep step;
  nn::DecodingProducts products;
  std::once_flag in_large_pages, packed;
};

Decoder::Decoder(nn::Transformer model, std::int64_t prefill_chunk)
    : model_(std::move(model)),
      prefill_chunk_(prefill_chunk),
      weights_(std::make_shared<Weights>(*model_)) {
  if (prefill_chunk < 1)
    throw std::invalid_argument("prefill chunk must be at least 1, not " +
                                std::to_string(prefill_chunk));
}

torch::Tensor Decoder::read(const torch::Tensor& ids) {
  if (ids.dim() != 2 || ids.scalar_type() != torch::kInt64 || ids.size(0) < 1 || ids.size(1) < 1)
    throw std::invalid_argument("expected ids (B, T) int64 with B, T at least 1, got " +
                                shape_of(ids) + " " + c10::toString(ids.scalar_type()));
  const auto batch = ids.size(0), length = ids.size(1);
  if (state_.batch != 0 && batch != state_.batch)
    throw std::invalid_argument("this decoder carries " + std::to_string(state_.batch) +
                                " sequences, got ids " + shape_of(ids));
  if (weights_->tensors.have_changed())
    throw std::logic_error(
        "Decoder::read: the model's weights have changed since the decoder was built; build "
        "another");
  const torch::NoGradGuard no_grad;
  if (ids.numel() == 1)
    std::call_once(weights_->in_large_pages, [&] { nn::move_to_large_pages(*model_); });
  if (batch > 1) std::call_once(weights_->packed, [&] { weights_->products.pack(*model_); });
  const auto on_device = ids.to(weights_->tensors.find("token_emb.weight").device());
  torch::Tensor logits;
  if (weights_->step.takes(on_device)) {
    logits = weights_->step(on_device, state_.layers);
  } else {
    const nn::DecodingProducts::Scope scope(weights_->products);
    for (std::int64_t begin = 0; begin < length; begin += prefill_chunk_) {
      const auto chunk = std::min(prefill_chunk_, length - begin);
      logits = model_->forward(on_device.narrow(1, begin, chunk), &state_.layers);
    }
  }
  state_.batch = batch;
  state_.position += length;
  return logits.select(1, -1);
}

void Decoder::set_state(DecoderState state) {
  const auto layers = static_cast<std::int64_t>(state.layers.size());
  const auto depth = model_->options().depth;
  if (layers != depth && layers != 0)
    throw std::invalid_argument("Decoder::set_state: expected the states of " +
                                std::to_string(depth) + " layers, got " + std::to_string(layers));
  state_ = std::move(state);
}

std::int64_t DecoderState::bytes() const {
  std::int64_t bytes = 0;
  for (const auto& layer : layers) bytes += layer.bytes();
  return bytes;
}

torch::Tensor encode_prompt(std::string_view text) {
  if (text.empty()) text = "\n";
  auto ids = torch::empty({1, static_cast<std::int64_t>(text.size())}, torch::kInt64);
  auto* out = ids.data_ptr<std::int64_t>();
  for (const char byte : text) *out++ = static_cast<unsigned char>(byte);
  return ids;
}

torch::Tensor generate(Decoder& decoder, const torch::Tensor& prompt,
                       const GenerateOptions& options,
                       const std::function<bool(const torch::Tensor& tokens)>& on_token) {
  if (options.length < 0)
    throw std::invalid_argument("length must be at least 0, not " + std::to_string(options.length));
  Sampler sample(options.sampling, options.seed);
  std::vector<torch::Tensor> drawn;
  auto logits = decoder.read(prompt);
  while (static_cast<std::int64_t>(drawn.size()) < options.length) {
    drawn.push_back(sample(logits));
    if (on_token && !on_token(drawn.back())) break;
    if (static_cast<std::int64_t>(drawn.size()) < options.length)
      logits = decoder.read(drawn.back().unsqueeze(1));
  }
  if (drawn.empty()) return torch::empty({prompt.size(0), 0}, torch::kInt64);
  return torch::stack(drawn, 1);
}

}  // namespace gateloop::generation
