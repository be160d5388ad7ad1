#include "ops/transformer_step.h"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <array>

#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/cpu/executor.h"
#include "ops/linear_row.h"

namespace gateloop::ops {
namespace {

const void* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

bool is_read_as_it_lies(const at::Tensor& t, at::ScalarType dtype) {
  return !t.defined() || (is_plain_cpu(t) && t.is_contiguous() && t.scalar_type() == dtype);
}

bool is_layer(const LayerWeights& w, at::ScalarType dtype) {
  const std::array tensors{
      &w.mixer_norm,   &w.mixer_norm_bias, &w.qkv,         &w.transition, &w.transition_bias,
      &w.sub_norm,     &w.sub_norm_bias,   &w.gates,       &w.out,        &w.ff_norm,
      &w.ff_norm_bias, &w.expand,          &w.expand_bias, &w.contract,   &w.contract_bias};
  return std::all_of(tensors.begin(), tensors.end(),
                     [&](const at::Tensor* t) { return is_read_as_it_lies(*t, dtype); });
}

/// The kernel reads what these sizes say.
struct Sizes {
  std::int64_t dim, inner, hidden, parts;
  bool post_norm;

  void check(const LayerWeights& w) const {
    const auto expect = [](const char* name, const at::Tensor& t, at::IntArrayRef sizes,
                           bool needed = true) {
      const bool fits = t.defined() ? t.sizes() == sizes : !needed;
      TORCH_CHECK(fits, "transformer_step: ", name, " must be ", sizes, ", got ",
                  t.defined() ? c10::str(t.sizes()) : "none");
    };
    expect("mixer_norm", w.mixer_norm, {dim});
    expect("mixer_norm_bias", w.mixer_norm_bias, {dim}, post_norm);
    expect("qkv", w.qkv, {3 * inner, dim});
    expect("transition", w.transition, {parts * inner, dim});
    expect("transition_bias", w.transition_bias, {parts * inner});
    expect("sub_norm", w.sub_norm, {inner}, false);
    expect("sub_norm_bias", w.sub_norm_bias, {inner}, w.sub_norm.defined());
    expect("gates", w.gates, {inner, dim}, false);
    expect("out", w.out, {dim, inner}, inner != dim);
    expect("ff_norm", w.ff_norm, {dim});
    expect("ff_norm_bias", w.ff_norm_bias, {dim}, post_norm);
    expect("expand", w.expand, {hidden, dim});
    expect("expand_bias", w.expand_bias, {hidden});
    expect("contract", w.contract, {dim, hidden});
    expect("contract_bias", w.contract_bias, {dim});
  }
  void check(const TransformerWeights& w) const {
    TORCH_CHECK(w.to_logits.sizes() == at::IntArrayRef({w.embedding.size(0), dim}) &&
                    (post_norm || w.final_norm.sizes() == at::IntArrayRef({dim})),
                "transformer_step: to_logits must be like the embedding, and final_norm (", dim,
                ")");
    for (const LayerWeights& layer : w.layers) check(layer);
  }
};

Sizes sizes_of(const TransformerWeights& w) {
  const std::int64_t dim = w.embedding.size(1);
  const bool empty =
      w.layers.empty() || !w.layers[0].qkv.defined() || !w.layers[0].expand.defined();
  return {dim, empty ? dim : w.layers[0].qkv.size(0) / 3, empty ? 1 : w.layers[0].expand.size(0),
          w.sigmoid_gate ? 1 : 2, w.post_norm};
}

}  // namespace

bool is_transformer_step(const at::Tensor& ids, const TransformerWeights& weights) {
  const auto dtype = weights.embedding.scalar_type();
  return ids.numel() == 1 && ids.dim() == 2 && ids.is_cpu() && !at::GradMode::is_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && at::isFloatingType(dtype) &&
         is_read_as_it_lies(weights.embedding, dtype) &&
         is_read_as_it_lies(weights.final_norm, dtype) &&
         is_read_as_it_lies(weights.to_logits, dtype) &&
         std::all_of(weights.layers.begin(), weights.layers.end(),
                     [&](const LayerWeights& layer) { return is_layer(layer, dtype); });
}

std::tuple<at::Tensor, std::vector<at::Tensor>> transformer_step(
    const at::Tensor& ids, const TransformerWeights& weights,
    const std::vector<at::Tensor>& states) {
  const at::Tensor& embedding = weights.embedding;
  const auto dtype = embedding.scalar_type();
  const auto wide = accumulation_type(dtype);
  const auto id = ids.item<std::int64_t>();
  const Sizes sizes = sizes_of(weights);
  sizes.check(weights);
  const std::int64_t inner = sizes.inner;
  const auto state_type = weights.sigmoid_gate ? wide : at::toComplexType(wide);

  std::vector<recurrence::TransformerLayer> layers;
  std::vector<at::Tensor> before, after;
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& w = weights.layers[i];
    before.push_back(i < states.size() ? contiguous_state(states[i]) : at::Tensor());
    TORCH_CHECK(
        !before[i].defined() || (is_plain_cpu(before[i]) && before[i].scalar_type() == state_type &&
                                 before[i].sizes() == at::IntArrayRef({1, inner})),
        "transformer_step: state ", i, " must be (1, ", inner, ") of ", state_type,
        " on the CPU, got ", before[i].sizes(), " of ", before[i].scalar_type(), " on ",
        before[i].device());
    after.push_back(at::empty({1, inner}, embedding.options().dtype(state_type)));
    layers.push_back({.mixer_norm = data(w.mixer_norm),
                      .mixer_norm_bias = data(w.mixer_norm_bias),
                      .qkv = data(w.qkv),
                      .transition = data(w.transition),
                      .transition_bias = data(w.transition_bias),
                      .sub_norm = data(w.sub_norm),
                      .sub_norm_bias = data(w.sub_norm_bias),
                      .gates = data(w.gates),
                      .out = data(w.out),
                      .ff_norm = data(w.ff_norm),
                      .ff_norm_bias = data(w.ff_norm_bias),
                      .expand = data(w.expand),
                      .expand_bias = data(w.expand_bias),
                      .contract = data(w.contract),
                      .contract_bias = data(w.contract_bias),
                      .state = data(before[i]),
                      .next_state = after[i].mutable_data_ptr()});
  }

  const auto tokens = weights.to_logits.size(0);
  at::Tensor logits = at::empty({1, 1, tokens}, embedding.options());
  run_kernel(recurrence::TransformerStep{.dtype = kernel_dtype(dtype),
                                         .dim = sizes.dim,
                                         .inner = inner,
                                         .hidden = sizes.hidden,
                                         .tokens = tokens,
                                         .post_norm = weights.post_norm,
                                         .sigmoid_gate = weights.sigmoid_gate,
                                         .normalize_input = weights.normalize_input,
                                         .layers = layers,
                                         .embedding = data(embedding.select(0, id)),
                                         .final_norm = data(weights.final_norm),
                                         .to_logits = data(weights.to_logits),
                                         .logits = logits.mutable_data_ptr()});
  return {logits, std::move(after)};
}

}  // namespace gateloop::ops
