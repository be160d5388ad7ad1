#include "training/diagnostics.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_sub.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>
#include <variant>

#include "nn/block.h"
#include "nn/transition.h"
#include "training/device.h"

namespace gateloop::training {
namespace {

using torch::Tensor;

// Bounds the time of a diagnosis.
constexpr std::int64_t kMostBytes = 2048;

torch::nn::ModuleListImpl& layers_of(nn::Transformer& model) {
  return *model->named_children()["layers"]->as<torch::nn::ModuleList>();
}

/// L2, of all of them together.
double norm_of(const std::vector<Tensor>& tensors) {
  if (tensors.empty()) return 0;
  return torch::stack(at::_foreach_norm(tensors, 2)).norm().item<double>();
}

Quantiles quantiles_of(const Tensor& values) {
  const Tensor at =
      torch::tensor(std::vector<double>(kQuantiles.begin(), kQuantiles.end()), values.options());
  // torch takes 2^24 numbers at most: of more, every n-th.
  const std::int64_t n = values.numel() / (std::int64_t{1} << 24) + 1;
  const Tensor numbers = values.flatten().slice(/*dim=*/0, /*start=*/0, std::nullopt, n);
  const Tensor found = at::quantile(numbers, at).to(torch::kCPU, torch::kDouble);
  Quantiles quantiles{};
  std::copy_n(found.const_data_ptr<double>(), quantiles.size(), quantiles.begin());
  return quantiles;
}

TransitionDiagnostics diagnose_transitions(Tensor z, const model::GateLoopSpec& spec,
                                           const nn::Ablation& ablation) {
  const bool two_parts = spec.transition_parts() == 2;
  if (two_parts && ablation.complex) z = nn::drop_imaginary(z);
  TransitionDiagnostics result;
  // 1 - |a| is exact where |a| is near 1, and falls as |a| rises: its quantiles come in reverse.
  Quantiles rest = quantiles_of(nn::input_scale(z, spec.gate, model::NormalizeInput::kMean));
  std::ranges::reverse(rest);
  for (std::size_t i = 0; i < rest.size(); ++i) {
    result.magnitudes[i] = 1 - rest[i];
    result.half_lives[i] = -std::numbers::ln2 / std::log1p(-rest[i]);
  }
  if (two_parts && !ablation.complex) {
    result.phases = quantiles_of(at::angle(nn::transition_of(z, spec.gate)));
  }
  return result;
}

/// Of a simple gate loop, (B, T, dim).
Tensor raw_transitions(const nn::SimpleGateLoopLayerImpl& simple, const Tensor& x) {
  auto children = simple.named_children();
  const Tensor in = children.contains("norm") ? children["norm"]->as<nn::RMSNorm>()->forward(x) : x;
  const auto project = children["to_qkva"]->named_children()["0"];
  return project->as<torch::nn::Linear>()->forward(in).chunk(3, -1)[2];
}

/// One layer on what flows through the model; what the layer does is added to `result`.
void pass_through(torch::nn::Module& block, const model::LayerSpec& spec, nn::Stream& stream,
                  const nn::Ablation& ablation, const nn::Packing& packing,
                  LayerDiagnostics& result) {
  auto children = block.named_children();
  if (children.contains("2")) {
    stream.settle();
    auto* simple = children["2"]->as<nn::SimpleGateLoopLayer>();
    const model::GateLoopSpec as_gate_loop{.gate = model::Gate::kSigmoid};
    result.simple_transitions =
        diagnose_transitions(raw_transitions(*simple, stream.x), as_gate_loop, ablation);
    stream.added = simple->forward_packed(stream.x, packing);
  }
  if (children.contains("0")) {
    auto mixer = std::dynamic_pointer_cast<nn::SpatialMixer>(children["0"]->named_children()["fn"]);
    children["0"]->as<nn::Residual>()->forward(stream, [&](const Tensor& in) {
      const auto* gate_loop = std::get_if<model::GateLoopSpec>(&spec.mixer);
      if (gate_loop && !ablation.state_transition) {
        const auto to_a = mixer->named_children()["to_a"]->named_children()["0"];
        const Tensor z = to_a->as<torch::nn::Linear>()->forward(in);
        result.transitions = diagnose_transitions(z, *gate_loop, ablation);
      }
      return mixer->forward(in, ablation, nullptr, packing);
    });
  }
  auto* feed_forward = children["1"]->named_children()["fn"]->as<nn::FeedForward>();
  children["1"]->as<nn::Residual>()->forward(stream, [&](const Tensor& in) {
    const auto expand = feed_forward->named_children()["0"];
    const Tensor hidden = expand->as<torch::nn::Linear>()->forward(in);
    const Tensor inactive = (hidden.flatten(0, -2).amax(0) < 0).to(torch::kDouble);
    result.inactive_units = inactive.mean().item<double>();
    return feed_forward->forward(in);
  });
}

/// The first windows of a text: (B, T) int64, at most kMostBytes, at least one window or its start.
Tensor first_windows(std::span<const std::uint8_t> text, std::int64_t length,
                     torch::Device device) {
  const std::int64_t time = std::min({length, kMostBytes, std::ssize(text)});
  const std::int64_t rows = std::clamp<std::int64_t>(kMostBytes / time, 1, std::ssize(text) / time);
  const Tensor ids = torch::empty({rows, time}, torch::kInt64);
  std::copy_n(text.begin(), rows * time, ids.mutable_data_ptr<std::int64_t>());
  return moved(ids, device);
}

}  // namespace

UpdateDiagnosis::UpdateDiagnosis(nn::Transformer model) : model_(std::move(model)) {
  const torch::NoGradGuard no_grad;
  for (const auto& layer : layers_of(model_)) {
    std::vector<Tensor> values, gradients;
    for (const Tensor& parameter : layer->parameters()) {
      values.push_back(parameter.detach().clone());
      if (parameter.grad().defined()) gradients.push_back(parameter.grad());
    }
    before_.push_back(std::move(values));
    gradient_norms_.push_back(norm_of(gradients));
  }
}

Diagnostics UpdateDiagnosis::diagnose(std::span<const std::uint8_t> text, std::int64_t length,
                                      Separator separator) const {
  const torch::NoGradGuard no_grad;
  nn::Transformer model = model_;
  const model::ModelSpec& spec = model->spec();
  PackedRows rows{first_windows(text, length, device_of(model)), {}};
  if (separator) rows = pack_rows(rows.ids, *separator);
  auto* embedding = model->named_children()["token_emb"]->as<torch::nn::Embedding>();
  nn::Stream stream{.x = embedding->forward(rows.ids), .added = {}, .input = {}};
  Diagnostics result(before_.size());
  for (std::size_t i = 0; i < result.size(); ++i) {
    torch::nn::Module& block = *layers_of(model)[i];
    LayerDiagnostics& layer = result[i];
    const std::vector<Tensor> after = block.parameters();
    layer.gradient_norm = gradient_norms_[i];
    layer.update_norm = norm_of(at::_foreach_sub(after, before_[i]));
    layer.weight_norm = norm_of(after);
    pass_through(block, spec.layers[i], stream, spec.ablation, rows.packing, layer);
  }
  return result;
}

}  // namespace gateloop::training
