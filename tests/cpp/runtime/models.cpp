#include "models.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "model/config_file.h"
#include "model/file.h"
#include "runtime/formats.h"

namespace gateloop::test {
namespace {

using model::AttentionSpec;
using model::GateLoopSpec;
using model::LayerSpec;
using model::ModelOptions;
using model::SimpleGateLoopSpec;

ModelOptions with_layers(std::vector<LayerSpec> layers) {
  ModelOptions options{.num_tokens = 37, .dim = 24};
  options.depth = static_cast<std::int64_t>(layers.size());
  options.layers = std::move(layers);
  return options;
}

LayerSpec layer(model::MixerSpec mixer) { return {.mixer = std::move(mixer), .ff_mult = 2}; }

/// A scale where sums of `fan_in` products stay near 1.
double scale_of(const model::Weight& weight) {
  return weight.role == model::Role::kEmbedding
             ? 1.0
             : 1 / std::sqrt(static_cast<double>(weight.shape[1]));
}

}  // namespace

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, std::vector<LayerSpec> layers) -> ModelOptions& {
    return all.emplace_back(Case{name, with_layers(std::move(layers))}).options;
  };
  const GateLoopSpec polar{.dim_inner = 24, .heads = 24};
  GateLoopSpec plain = polar, joint = polar, sub = polar, sigmoid = polar, wide = polar;
  plain.add_swish_gating = false;
  joint.joint_kv = true;
  sub.sub_ln = true;
  sub.dim_inner = sub.heads = 40;
  sigmoid.gate = model::Gate::kSigmoid;
  GateLoopSpec normalized = sigmoid, joint_sigmoid = sigmoid;
  normalized.normalize_input = model::NormalizeInput::kMean;
  joint_sigmoid.joint_kv = true;
  wide.heads = 3;
  GateLoopSpec wide_sigmoid = wide;
  wide_sigmoid.gate = model::Gate::kSigmoid;
  wide_sigmoid.normalize_input = model::NormalizeInput::kMean;
  GateLoopSpec paper = polar, mean = polar, variance = sigmoid, joint_paper = polar;
  paper.gate = joint_paper.gate = model::Gate::kMagnitudePhase;
  paper.normalize_input = variance.normalize_input = model::NormalizeInput::kVariance;
  paper.transition_bias = {-2, 4};
  paper.phase_bias = {0, 3};
  mean.normalize_input = model::NormalizeInput::kMean;
  joint_paper.joint_kv = true;
  GateLoopSpec uneven = wide, per_key = wide, taylor = wide;
  uneven.dim_key = 12;
  uneven.normalize_input = model::NormalizeInput::kVariance;
  per_key.gate = model::Gate::kMagnitudePhase;
  per_key.per_key_transitions = true;
  per_key.dim_key = 30;
  per_key.normalize_input = model::NormalizeInput::kMean;
  taylor.feature_map = model::FeatureMap::kTaylor;
  taylor.dim_key = 15;
  const AttentionSpec attention{.heads = 3, .dim_head = 8};
  AttentionSpec rotary = attention, relative = attention, linear = attention, ring = rotary;
  rotary.rotary_emb = true;
  relative.data_dependent_rel_pos = true;
  relative.softmax_normalize = false;
  linear.softmax_normalize = false;
  linear.add_swish_gating = false;
  ring.rotary_emb = true;
  ring.window = 5;

  add("polar", {layer(polar), layer(polar)});
  add("plain", {layer(plain)});
  add("joint", {layer(joint), layer(joint_sigmoid)});
  add("sub_ln", {layer(sub)});
  add("sigmoid", {layer(sigmoid), layer(normalized)});
  add("wide", {layer(wide), layer(wide_sigmoid)});
  add("magnitude_phase", {layer(paper), layer(joint_paper)});
  add("input_scales", {layer(mean), layer(variance)});
  add("uneven", {layer(uneven), layer(per_key)});
  add("taylor", {layer(taylor)});
  add("attention", {layer(attention), layer(rotary)});
  add("relative", {layer(relative)});
  add("linear_attention", {layer(linear)});
  add("window", {layer(ring), layer(polar)});
  add("no_mixer", {layer(model::NoMixer{}), layer(polar)});
  add("no_layers", {});
  for (auto [prenorm, post_ln] : {std::pair{true, true}, {false, false}}) {
    LayerSpec first = layer(polar), second = layer(model::NoMixer{});
    first.simple_gate_loop = second.simple_gate_loop =
        SimpleGateLoopSpec{.prenorm = prenorm, .post_ln = post_ln};
    add(prenorm ? "simple_normed" : "simple_bare", {first, layer(rotary), second});
  }
  add("tied", {layer(polar)}).tie_embeddings = true;
  const std::size_t count = all.size();
  for (std::size_t i = 0; i < count; ++i) {
    all.push_back(all[i]);
    all.back().name += "_post_norm";
    all.back().options.post_ln_norm = true;
  }
  add("no_complex", {layer(polar), layer(wide), layer(paper), layer(per_key), layer(relative)})
      .ablate_complex = true;
  add("no_transition", {layer(polar), layer(sigmoid), layer(joint), layer(wide), layer(paper),
                        layer(per_key), layer(taylor), layer(relative)})
      .ablate_state_transition = true;
  return all;
}

Case case_of(const std::string& name) {
  for (const Case& one : cases())
    if (one.name == name) return one;
  throw std::invalid_argument("no case " + name);
}

ModelOptions random_options(std::mt19937_64& random) {
  const auto coin = [&] { return random() % 2 == 0; };
  const auto up_to = [&](std::int64_t most) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(most)) + 1;
  };
  const auto one_of = [&](const auto& named) { return named[random() % named.size()].second; };
  std::vector<LayerSpec> layers;
  for (std::int64_t i = up_to(3); i > 0; --i) {
    LayerSpec one{.mixer = model::NoMixer{}, .ff_mult = up_to(3)};
    if (const std::int64_t kind = up_to(5); kind <= 3) {
      auto& s = one.mixer.emplace<GateLoopSpec>();
      s.gate = one_of(model::names_of(model::Gate()));
      s.heads = up_to(6);
      s.dim_inner = s.heads * (coin() ? 1 : up_to(9));
      if (coin()) s.dim_key = s.heads * up_to(7);
      if (up_to(4) == 1) s.feature_map = model::FeatureMap::kTaylor;
      s.per_key_transitions = s.feature_map == model::FeatureMap::kNone && coin();
      s.joint_kv = s.has_max_heads() && coin();
      s.add_swish_gating = coin();
      s.sub_ln = coin();
      s.normalize_input = one_of(model::names_of(model::NormalizeInput()));
    } else if (kind == 4) {
      auto& s = one.mixer.emplace<AttentionSpec>();
      s.heads = up_to(4);
      s.dim_head = 2 * up_to(5);
      s.rotary_emb = coin();
      s.softmax_normalize = coin();
      s.add_swish_gating = coin();
      if (coin()) s.window = up_to(12);
    }
    if (coin()) one.simple_gate_loop = SimpleGateLoopSpec{.prenorm = coin(), .post_ln = coin()};
    layers.push_back(one);
  }
  ModelOptions options = with_layers(std::move(layers));
  options.num_tokens = up_to(70);
  options.dim = up_to(50);
  options.post_ln_norm = coin();
  options.tie_embeddings = coin();
  options.ablate_complex = up_to(4) == 1;
  options.ablate_state_transition = up_to(4) == 1;
  return options;
}

Weights random_weights(const model::ModelSpec& spec, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  Weights weights;
  for (const model::Weight& weight : model::weight_table(spec)) {
    auto& numbers = weights[weight.name];
    const bool gain = weight.name.ends_with("gamma") ||
                      (weight.name.ends_with("weight") && weight.shape.size() == 1);
    for (std::int64_t i = 0; i < weight.numel(); ++i) {
      double value = normal(random);
      if (weight.role == model::Role::kConstant) {
        value = std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(weight.numel()));
      } else {
        value *= weight.shape.size() == 2 ? scale_of(weight) : 0.2;
      }
      numbers.push_back(static_cast<double>(static_cast<float>(gain ? 1 + value : value)));
    }
  }
  return weights;
}

void write_model(const std::string& dir, const ModelOptions& options, Weights& weights,
                 const std::string& dtype) {
  const model::ModelSpec spec = model::resolve(options);
  std::vector<runtime::Converted> copies;
  std::vector<model::TensorBytes> tensors;
  for (const model::Weight& weight : model::weight_table(spec)) {
    auto& numbers = weights.at(weight.name);
    const auto* const bytes = reinterpret_cast<const std::byte*>(numbers.data());
    const auto count = static_cast<std::int64_t>(numbers.size());
    std::string stored = weight.role == model::Role::kConstant ? "F32" : dtype;
    if (stored == "F64") {
      tensors.push_back({weight.name, stored, weight.shape, numbers.data()});
      continue;
    }
    const auto storage = runtime::storage_of(runtime::Format::kFile, stored);
    const runtime::Converted& copy =
        copies.emplace_back(runtime::convert({"F64", 1, count, bytes, nullptr}, storage));
    std::vector<float> rounded(numbers.size());
    runtime::read_floats(stored, copy.data.data(), count, rounded.data());
    numbers.assign(rounded.begin(), rounded.end());
    tensors.push_back({weight.name, stored, weight.shape, copy.data.data()});
  }
  model::write_safetensors(dir + "/model.safetensors", tensors, {});
  model::save_text(dir + "/config.json",
                   "{\"format\": 1, \"model\": " + model::to_json(options) + "}");
}

Weights read_weights(const std::string& dir) {
  const model::ModelFiles files = model::open_model(dir, model::Weights::kLatest);
  const std::string bytes = model::read_text(files.weights);
  std::map<std::string, model::TensorEntry> entries;
  for (const model::TensorEntry& entry : files.header.tensors) entries.emplace(entry.name, entry);
  Weights weights;
  for (const model::Weight& weight : model::weight_table(files.spec)) {
    const model::TensorEntry& entry = entries.at(weight.name);
    auto& numbers = weights[weight.name];
    if (entry.dtype != "I8") {
      std::vector<float> wide(static_cast<std::size_t>(weight.numel()));
      runtime::read_floats(entry.dtype,
                           reinterpret_cast<const std::byte*>(bytes.data()) + entry.begin,
                           weight.numel(), wide.data());
      numbers.assign(wide.begin(), wide.end());
      continue;
    }
    const std::uint64_t scales = entries.at(weight.name + ".scale").begin;
    for (std::int64_t i = 0; i < weight.numel(); ++i) {
      float scale = 0;
      std::memcpy(&scale, bytes.data() + scales + sizeof(float) * (i / weight.shape[1]),
                  sizeof scale);
      numbers.push_back(static_cast<double>(scale) *
                        static_cast<signed char>(bytes[entry.begin + i]));
    }
  }
  return weights;
}

std::vector<std::int64_t> random_ids(const model::ModelSpec& spec, std::int64_t count,
                                     std::mt19937_64& random) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < count; ++i)
    ids.push_back(
        static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(spec.num_tokens)));
  return ids;
}

}  // namespace gateloop::test
