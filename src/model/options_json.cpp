#include <algorithm>
#include <stdexcept>
#include <string>

#include "gateloop/model.h"
#include "model/json_fields.h"
#include "model/limits.h"
#include "model/parse_json.h"

namespace gateloop::model {

// Every field of a struct, once; for_each_field() is found by argument-dependent lookup.

GATELOOP_JSON_FIELDS(SimpleGateLoopSpec, prenorm, post_ln)

GATELOOP_JSON_FIELDS(GateLoopSpec, dim_inner, heads, dim_key, gate, per_key_transitions,
                     feature_map, joint_kv, add_swish_gating, sub_ln, normalize_input,
                     transition_bias, phase_bias, frac_gradient_state_transition,
                     checkpoint_gate_looped_attn)

GATELOOP_JSON_FIELDS(AttentionSpec, heads, dim_head, rotary_emb, data_dependent_rel_pos,
                     softmax_normalize, add_swish_gating, frac_gradient_data_dependent_rel_pos,
                     window)

template <typename Options, typename Visitor>
requires std::is_same_v<std::remove_const_t<Options>, NoMixer>
void for_each_field(Options&, Visitor&&) {}

/// Beside its mixer's.
GATELOOP_JSON_FIELDS(LayerSpec, simple_gate_loop, ff_mult)

/// Beside its layers.
template <typename Options, typename Visitor>
requires std::is_same_v<std::remove_const_t<Options>, ModelSpec>
void for_each_field(Options& options, Visitor&& visit) {
  visit("num_tokens", options.num_tokens);
  visit("dim", options.dim);
  visit("post_norm", options.post_norm);
  visit("tie_embeddings", options.tie_embeddings);
  visit("ablate_complex", options.ablation.complex);
  visit("ablate_state_transition", options.ablation.state_transition);
}

/// Beside its layers.
GATELOOP_JSON_FIELDS(ModelOptions, num_tokens, dim, depth, dim_head, heads, ff_mult,
                     checkpoint_gate_looped_attn, use_gate_looped_attn, gate_loop_heads,
                     attn_add_swish_gating, dim_gate_looped_attn, attn_softmax_normalize,
                     data_dependent_rel_pos, frac_gradient_state_transition, ablate_complex,
                     ablate_state_transition, rotary_emb, post_ln_norm, sub_ln, gate,
                     normalize_input, transition_bias, joint_kv, gate_loop_dim_key,
                     per_key_transitions, feature_map, phase_bias, window, tie_embeddings,
                     simple_gate_loop)

namespace {

using json_fields::json;

constexpr const char* kLayers = "layers";
/// Left out at their defaults: programs of version 0.1 refuse fields that they do not have.
constexpr const char* kBeyondVersion01[] = {
    "joint_kv", "gate_loop_dim_key", "per_key_transitions", "feature_map", "phase_bias",
    "window",   "tie_embeddings",    "simple_gate_loop"};
constexpr const char* kBeyondVersion01OfGateLoop[] = {"dim_key", "per_key_transitions",
                                                      "feature_map", "phase_bias"};

}  // namespace

json encode(const SimpleGateLoopSpec& spec) { return json_fields::encode_fields(spec); }

void decode(const std::string& name, const json& value, SimpleGateLoopSpec& spec) {
  if (!value.is_object())
    json_fields::wrong_type(name, "null or an object such as {\"prenorm\": true}", value);
  json_fields::decode_fields(value, spec);
}

namespace {

/// `options` as an object, without these fields where they have their defaults.
template <typename Options, std::size_t kCount>
json encode_but_defaults(const Options& options, const char* const (&names)[kCount]) {
  json object = json_fields::encode_fields(options);
  const json defaults = json_fields::encode_fields(Options());
  for (const char* name : names)
    if (object[name] == defaults[name]) object.erase(name);
  return object;
}

json encode_mixer(const GateLoopSpec& spec) {
  return encode_but_defaults(spec, kBeyondVersion01OfGateLoop);
}
template <typename Spec>
json encode_mixer(const Spec& spec) {
  return json_fields::encode_fields(spec);
}

json encode_layer(const LayerSpec& layer) {
  json object = {{"mixer", std::string(mixer_name(layer.mixer))}};
  object.update(std::visit([](const auto& spec) { return encode_mixer(spec); }, layer.mixer));
  object.update(json_fields::encode_fields(layer));
  return object;
}

json encode_layers(const std::vector<LayerSpec>& layers) {
  json list = json::array();
  for (const LayerSpec& layer : layers) list.push_back(encode_layer(layer));
  return list;
}

/// A mixer's name, or an object of what differs from the options.
LayerSpec decode_layer(const json& value, const ModelOptions& options) {
  if (value.is_string()) return layer_of(options, value.get<std::string>());
  if (!value.is_object() || !value.contains("mixer") || !value["mixer"].is_string()) {
    json_fields::wrong_type(kLayers,
                            "a list of mixers' names and of objects {\"mixer\": name, ...}", value);
  }
  json object = value;
  LayerSpec layer = layer_of(options, object["mixer"].get<std::string>());
  object.erase("mixer");
  json_fields::take_fields(object, layer);
  std::visit([&](auto& mixer) { json_fields::take_fields(object, mixer); }, layer.mixer);
  // A width given without a number of heads means max heads where the options have them.
  if (auto* mixer = std::get_if<GateLoopSpec>(&layer.mixer);
      mixer && !value.contains("heads") && !options.gate_loop_heads)
    mixer->heads = mixer->dim_inner;
  if (auto* mixer = std::get_if<AttentionSpec>(&layer.mixer);
      mixer && !value.contains("softmax_normalize") && !options.attn_softmax_normalize)
    mixer->softmax_normalize = !mixer->data_dependent_rel_pos;
  json_fields::expect_empty(object);
  return layer;
}

std::vector<LayerSpec> decode_layers(const json& value, const ModelOptions& options) {
  if (!value.is_array() || value.empty())
    json_fields::wrong_type(kLayers, "a pattern or a list of layers, not empty", value);
  // What is too deep is refused by resolve().
  const auto depth =
      static_cast<std::size_t>(std::clamp<std::int64_t>(options.depth, 0, kMostLayers));
  if (value.size() > depth)
    throw std::runtime_error("option \"layers\" must have at most depth " + std::to_string(depth) +
                             " entries, not " + std::to_string(value.size()));
  std::vector<LayerSpec> layers;
  for (std::size_t i = 0; i < depth; ++i)
    layers.push_back(i < value.size() ? decode_layer(value[i], options) : layers[i - value.size()]);
  return layers;
}

}  // namespace

std::string to_json(const ModelOptions& options) {
  json object = encode_but_defaults(options, kBeyondVersion01);
  if (!options.layers.empty()) {
    object[kLayers] = encode_layers(options.layers);
  } else if (!options.layer_pattern.empty()) {
    object[kLayers] = options.layer_pattern;
  }
  return object.dump(2);
}

ModelOptions options_from_json(const std::string& text) {
  ModelOptions options;
  try {
    json object = parse_json<json>(text);
    json_fields::take_fields(object, options);
    // Last, because layers start from what the other options say.
    if (const auto found = object.find(kLayers); found != object.end()) {
      if (found->is_string()) {
        options.layer_pattern = found->get<std::string>();
      } else if (!found->is_null()) {
        options.layers = decode_layers(*found, options);
      }
      object.erase(found);
    }
    json_fields::expect_empty(object);
  } catch (const std::exception& error) {  // of the JSON parser or of a field
    throw std::runtime_error(std::string("model: ") + error.what());
  }
  return options;
}

std::string to_json(const ModelSpec& spec) {
  json object = json_fields::encode_fields(spec);
  object[kLayers] = encode_layers(spec.layers);
  return object.dump(2);
}

}  // namespace gateloop::model
