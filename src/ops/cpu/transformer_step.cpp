#include "ops/transformer_step.h"

#include <ATen/autocast_mode.h>

#include <algorithm>
#include <iterator>

#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/cpu/executor.h"

namespace gateloop::ops {
namespace {

using recurrence::TransformerLayer;

struct Sizes {
  std::int64_t dim, inner, hidden, parts;
};

/// Which models have a weight.
enum class Needed { kAlways, kWithPostNorm, kWithSubNorm, kUnlessSquare, kNever };

/// A weight's member in the kernel's struct, its shape, and which models have it.
struct Weight {
  const char* name;
  const void* TransformerLayer::*pointer;
  std::int64_t (*rows)(const Sizes&);
  std::int64_t (*columns)(const Sizes&);  // null: a vector
  Needed needed;
};

std::int64_t dim(const Sizes& s) { return s.dim; }
std::int64_t inner(const Sizes& s) { return s.inner; }
std::int64_t hidden(const Sizes& s) { return s.hidden; }
std::int64_t three_inner(const Sizes& s) { return 3 * s.inner; }
std::int64_t transitions(const Sizes& s) { return s.parts * s.inner; }

/// In the order of kLayerWeights.
constexpr Weight kWeights[] = {
    {"mixer_norm", &TransformerLayer::mixer_norm, dim, nullptr, Needed::kAlways},
    {"mixer_norm_bias", &TransformerLayer::mixer_norm_bias, dim, nullptr, Needed::kWithPostNorm},
    {"qkv", &TransformerLayer::qkv, three_inner, dim, Needed::kAlways},
    {"transition", &TransformerLayer::transition, transitions, dim, Needed::kAlways},
    {"transition_bias", &TransformerLayer::transition_bias, transitions, nullptr, Needed::kAlways},
    {"sub_norm", &TransformerLayer::sub_norm, inner, nullptr, Needed::kNever},
    {"sub_norm_bias", &TransformerLayer::sub_norm_bias, inner, nullptr, Needed::kWithSubNorm},
    {"gates", &TransformerLayer::gates, inner, dim, Needed::kNever},
    {"out", &TransformerLayer::out, dim, inner, Needed::kUnlessSquare},
    {"ff_norm", &TransformerLayer::ff_norm, dim, nullptr, Needed::kAlways},
    {"ff_norm_bias", &TransformerLayer::ff_norm_bias, dim, nullptr, Needed::kWithPostNorm},
    {"expand", &TransformerLayer::expand, hidden, dim, Needed::kAlways},
    {"expand_bias", &TransformerLayer::expand_bias, hidden, nullptr, Needed::kAlways},
    {"contract", &TransformerLayer::contract, dim, hidden, Needed::kAlways},
    {"contract_bias", &TransformerLayer::contract_bias, dim, nullptr, Needed::kAlways},
};
static_assert(std::size(kWeights) == std::size(kLayerWeights));

bool is_needed(Needed needed, const TransformerWeights& model, const LayerWeights& layer,
               const Sizes& s) {
  switch (needed) {
    case Needed::kAlways:
      return true;
    case Needed::kWithPostNorm:
      return model.post_norm;
    case Needed::kWithSubNorm:
      return layer.sub_norm.defined();
    case Needed::kUnlessSquare:
      return s.inner != s.dim;
    case Needed::kNever:
      break;
  }
  return false;
}

/// Of absent weights zero, which check_weight() then refuses.
Sizes sizes_of(const TransformerWeights& w) {
  const auto rows = [&](at::Tensor LayerWeights::*weight) {
    return w.layers.empty() || !(w.layers[0].*weight).defined() ? 0 : (w.layers[0].*weight).size(0);
  };
  const std::int64_t dim = w.embedding.size(1);
  if (w.layers.empty()) return {dim, dim, 1, 1};
  return {dim, rows(&LayerWeights::qkv) / 3, rows(&LayerWeights::expand), w.sigmoid_gate ? 1 : 2};
}

void check_weight(const char* name, const at::Tensor& weight, at::IntArrayRef sizes, bool needed) {
  const bool fits = weight.defined() ? weight.sizes() == sizes : !needed;
  TORCH_CHECK(fits, "transformer_step: ", name, " must be ", sizes, ", got ",
              weight.defined() ? c10::str(weight.sizes()) : "none");
}

/// Pointers to the weights of a layer, of checked shapes: 3 us a token for six layers.
TransformerLayer layer_of(const TransformerWeights& model, const LayerWeights& weights,
                          const Sizes& s) {
  TransformerLayer layer;
  for (std::size_t i = 0; i < std::size(kWeights); ++i) {
    const Weight& w = kWeights[i];
    const at::Tensor& tensor = weights.*kLayerWeights[i];
    at::DimVector sizes{w.rows(s)};
    if (w.columns != nullptr) sizes.push_back(w.columns(s));
    check_weight(w.name, tensor, sizes, is_needed(w.needed, model, weights, s));
    if (tensor.defined()) layer.*w.pointer = tensor.const_data_ptr();
  }
  return layer;
}

bool is_dense_cpu(const at::Tensor& t, at::ScalarType dtype) {
  return !t.defined() || (is_plain_cpu(t) && t.is_contiguous() && t.scalar_type() == dtype);
}

}  // namespace

bool is_transformer_step(const at::Tensor& ids, const TransformerWeights& weights) {
  const auto dtype = weights.embedding.scalar_type();
  const auto is_dense = [&](const at::Tensor& t) { return is_dense_cpu(t, dtype); };
  return ids.numel() == 1 && ids.dim() == 2 && ids.is_cpu() &&
         (ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt) &&
         !at::GradMode::is_enabled() && !at::autocast::is_autocast_enabled(at::kCPU) &&
         at::isFloatingType(dtype) && is_dense(weights.embedding) && is_dense(weights.final_norm) &&
         is_dense(weights.to_logits) &&
         std::all_of(weights.layers.begin(), weights.layers.end(), [&](const LayerWeights& layer) {
           return std::all_of(std::begin(kLayerWeights), std::end(kLayerWeights),
                              [&](auto weight) { return is_dense(layer.*weight); });
         });
}

std::tuple<at::Tensor, std::vector<at::Tensor>> transformer_step(
    const at::Tensor& ids, const TransformerWeights& weights,
    const std::vector<at::Tensor>& states) {
  const at::Tensor& embedding = weights.embedding;
  const auto dtype = embedding.scalar_type();
  const auto wide = accumulation_type(dtype);
  const auto state_type = weights.sigmoid_gate ? wide : at::toComplexType(wide);
  const Sizes s = sizes_of(weights);
  const std::int64_t tokens = embedding.size(0), id = ids.item<std::int64_t>();
  TORCH_CHECK_INDEX(id >= 0 && id < tokens, "transformer_step: ids must be in [0, ", tokens,
                    "), got ", id);
  check_weight("to_logits", weights.to_logits, {tokens, s.dim}, true);
  check_weight("final_norm", weights.final_norm, {s.dim}, !weights.post_norm);

  TORCH_CHECK_VALUE(states.empty() || states.size() == weights.layers.size(),
                    "transformer_step: states must be one for each of ", weights.layers.size(),
                    " layers, or none at the start, got ", states.size());

  std::vector<TransformerLayer> layers;
  std::vector<at::Tensor> before, after;
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    TransformerLayer& layer = layers.emplace_back(layer_of(weights, weights.layers[i], s));
    const at::Tensor& state =
        before.emplace_back(states.empty() ? at::Tensor() : contiguous(states[i]));
    TORCH_CHECK(!state.defined() || (is_plain_cpu(state) && state.scalar_type() == state_type &&
                                     state.sizes() == at::IntArrayRef({1, s.inner})),
                "transformer_step: state ", i, " must be (1, ", s.inner, ") of ", state_type,
                " on the CPU, got ", state.sizes(), " of ", state.scalar_type(), " on ",
                state.device());
    layer.state = state_input(state);
    layer.next_state =
        after.emplace_back(at::empty({1, s.inner}, embedding.options().dtype(state_type)))
            .mutable_data_ptr();
  }

  at::Tensor logits = at::empty({1, 1, tokens}, embedding.options());
  run_kernel(recurrence::TransformerStep{
      .dtype = kernel_dtype(dtype),
      .dim = s.dim,
      .inner = s.inner,
      .hidden = s.hidden,
      .tokens = tokens,
      .post_norm = weights.post_norm,
      .sigmoid_gate = weights.sigmoid_gate,
      .normalize_input = weights.normalize_input,
      .layers = layers,
      .embedding = embedding.select(0, id).const_data_ptr(),
      .final_norm = weights.post_norm ? nullptr : weights.final_norm.const_data_ptr(),
      .to_logits = weights.to_logits.const_data_ptr(),
      .logits = logits.mutable_data_ptr()});
  return {logits, std::move(after)};
}

}  // namespace gateloop::ops
