// From options to the description of a model.
#include <charconv>
#include <stdexcept>

#include "gateloop/model.h"
#include "model/limits.h"

namespace gateloop::model {
namespace {

[[noreturn]] void fail(const std::string& problem) { throw std::invalid_argument(problem); }

void check_size(const char* owner, const char* name, std::int64_t value,
                std::int64_t most = kMostOfASize) {
  if (value < 1)
    fail(std::string(owner) + ": " + name + " must be positive, got " + std::to_string(value));
  if (value > most)
    fail(std::string(owner) + ": " + name + " must be at most " + std::to_string(most) + ", got " +
         std::to_string(value));
}

constexpr std::pair<std::string_view, Gate> kGates[] = {{"polar", Gate::kPolar},
                                                        {"sigmoid", Gate::kSigmoid},
                                                        {"magnitude_phase", Gate::kMagnitudePhase}};
constexpr std::pair<std::string_view, NormalizeInput> kNormalizations[] = {
    {"none", NormalizeInput::kNone},
    {"mean", NormalizeInput::kMean},
    {"variance", NormalizeInput::kVariance}};
constexpr std::pair<std::string_view, FeatureMap> kFeatureMaps[] = {
    {"none", FeatureMap::kNone}, {"taylor", FeatureMap::kTaylor}};

GateLoopSpec gate_loop_of(const ModelOptions& o) {
  const std::int64_t inner = o.dim_gate_looped_attn.value_or(o.dim);
  return {.dim_inner = inner,
          .heads = o.gate_loop_heads.value_or(inner),
          .dim_key = o.gate_loop_dim_key,
          .gate = o.gate,
          .per_key_transitions = o.per_key_transitions,
          .feature_map = o.feature_map,
          .joint_kv = o.joint_kv,
          .add_swish_gating = o.attn_add_swish_gating,
          .sub_ln = o.sub_ln,
          .normalize_input = o.normalize_input,
          .transition_bias = o.transition_bias,
          .phase_bias = o.phase_bias,
          .frac_gradient_state_transition = o.frac_gradient_state_transition,
          .checkpoint_gate_looped_attn = o.checkpoint_gate_looped_attn};
}

AttentionSpec attention_of(const ModelOptions& o) {
  return {.heads = o.heads,
          .dim_head = o.dim_head,
          .rotary_emb = o.rotary_emb,
          .data_dependent_rel_pos = o.data_dependent_rel_pos,
          .softmax_normalize = o.attn_softmax_normalize.value_or(!o.data_dependent_rel_pos),
          .add_swish_gating = o.attn_add_swish_gating,
          .frac_gradient_data_dependent_rel_pos = o.frac_gradient_state_transition,
          .window = o.window};
}

struct Check {
  void operator()(const GateLoopSpec& s) const {
    const char* name = "GateLoopedAttention";
    check_size(name, "dim_inner", s.dim_inner);
    check_size(name, "heads", s.heads);
    if (s.dim_inner % s.heads != 0)
      fail(std::string(name) + ": heads must divide dim_inner, got " + std::to_string(s.heads) +
           " heads for dim_inner " + std::to_string(s.dim_inner));
    if (s.dim_key) check_size(name, "dim_key", *s.dim_key);
    if (s.dim_keys() % s.heads != 0)
      fail(std::string(name) + ": heads must divide dim_key, got " + std::to_string(s.heads) +
           " heads for dim_key " + std::to_string(s.dim_keys()));
    check_size(name, "keys of a head's state", s.state_keys());
    if (s.transition_bias && s.gate == Gate::kPolar)
      fail(std::string(name) +
           ": transition_bias needs the sigmoid or magnitude_phase gate, got polar");
    if (s.phase_bias && s.gate != Gate::kMagnitudePhase)
      fail(std::string(name) + ": phase_bias needs the magnitude_phase gate, got " +
           std::string(name_of(s.gate)));
    if (s.per_key_transitions && s.feature_map != FeatureMap::kNone)
      fail(std::string(name) + ": per_key_transitions must be false with the feature map " +
           std::string(name_of(s.feature_map)) + ", whose keys are products of several channels");
    if (s.joint_kv && !s.has_max_heads())
      fail(std::string(name) + ": joint_kv needs max heads, one per channel, got " +
           std::to_string(s.heads) + " heads for dim_inner " + std::to_string(s.dim_inner));
  }
  void operator()(const AttentionSpec& s) const {
    const char* name = "CausalFullAttention";
    check_size(name, "dim_head", s.dim_head);
    check_size(name, "heads", s.heads, kMostOfASize / s.dim_head);
    if (s.dim_head % 2 != 0 && (s.rotary_emb || s.data_dependent_rel_pos))
      fail(std::string(name) + ": dim_head must be even with " +
           (s.rotary_emb ? "rotary_emb" : "data_dependent_rel_pos") + ", got " +
           std::to_string(s.dim_head));
    if (s.window) check_size(name, "window", *s.window);
  }
  void operator()(const NoMixer&) const {}
};

}  // namespace

Names<Gate> names_of(Gate) { return kGates; }
Names<NormalizeInput> names_of(NormalizeInput) { return kNormalizations; }
Names<FeatureMap> names_of(FeatureMap) { return kFeatureMaps; }

void check(const MixerSpec& mixer) { std::visit(Check(), mixer); }

void check(const ModelSpec& spec) {
  check_size("Transformer", "num_tokens", spec.num_tokens);
  check_size("Transformer", "dim", spec.dim);
  for (const LayerSpec& layer : spec.layers) {
    check(layer.mixer);
    check_size("FeedForward", "mult", layer.ff_mult, kMostOfASize / spec.dim);
  }
}

LayerSpec layer_of(const ModelOptions& options, std::string_view mixer) {
  LayerSpec layer{
      .mixer = NoMixer{}, .simple_gate_loop = options.simple_gate_loop, .ff_mult = options.ff_mult};
  if (mixer == "gate_loop") {
    layer.mixer = gate_loop_of(options);
  } else if (mixer == "attention") {
    layer.mixer = attention_of(options);
  } else if (mixer != "none") {
    fail("Transformer: a layer's mixer must be gate_loop, attention or none, got \"" +
         std::string(mixer) + "\"");
  }
  return layer;
}

std::string_view mixer_name(const MixerSpec& mixer) {
  constexpr std::string_view kNames[] = {"gate_loop", "attention", "none"};
  return kNames[mixer.index()];
}

ModelSpec resolve(const ModelOptions& options) {
  check_size("Transformer", "num_tokens", options.num_tokens);
  check_size("Transformer", "dim", options.dim);
  if (options.depth < 0)
    fail("Transformer: depth must not be negative, got " + std::to_string(options.depth));
  if (options.depth > kMostLayers)
    fail("Transformer: depth must be at most " + std::to_string(kMostLayers) + ", got " +
         std::to_string(options.depth));
  const auto depth = static_cast<std::size_t>(options.depth);
  ModelSpec spec{.num_tokens = options.num_tokens,
                 .dim = options.dim,
                 .post_norm = options.post_ln_norm,
                 .tie_embeddings = options.tie_embeddings,
                 .ablation = {.complex = options.ablate_complex,
                              .state_transition = options.ablate_state_transition},
                 .layers = options.layers};
  if (spec.layers.empty()) {
    const std::string mixer = options.use_gate_looped_attn ? "gate_loop" : "attention";
    spec.layers =
        parse_layers(options.layer_pattern.empty() ? mixer : options.layer_pattern, options);
  }
  if (spec.layers.size() != depth)
    fail("Transformer: layers must have one entry for each of depth " + std::to_string(depth) +
         ", got " + std::to_string(spec.layers.size()));
  check(spec);
  return spec;
}

std::vector<LayerSpec> parse_layers(const std::string& pattern, const ModelOptions& options) {
  const auto refuse = [&](const std::string& why) {
    fail("Transformer: layers must be a pattern such as \"gate_loop*2,attention\", got \"" +
         pattern + "\": " + why);
  };
  const auto depth = static_cast<std::size_t>(std::max<std::int64_t>(0, options.depth));
  std::vector<LayerSpec> period;
  for (std::size_t begin = 0; begin <= pattern.size();) {
    const std::size_t end = std::min(pattern.find(',', begin), pattern.size());
    const std::string item = pattern.substr(begin, end - begin);
    begin = end + 1;
    const std::size_t star = item.find('*');
    std::size_t count = 1;
    if (star != std::string::npos) {
      const char* last = item.data() + item.size();
      const auto [stop, error] = std::from_chars(item.data() + star + 1, last, count);
      if (error != std::errc() || stop != last || count < 1)
        refuse("\"" + item + "\" does not end in a number of layers");
    }
    if (depth > 0 && count > depth - std::min(depth, period.size()))
      refuse("it has more than the model's " + std::to_string(depth) + " layers");
    const std::string name = item.substr(0, star);
    if (name != "gate_loop" && name != "attention" && name != "none")
      refuse("\"" + name + "\" is not gate_loop, attention or none");
    period.insert(period.end(), std::min(count, depth + 1), layer_of(options, name));
  }
  std::vector<LayerSpec> layers;
  for (std::size_t i = 0; i < depth; ++i) layers.push_back(period[i % period.size()]);
  return layers;
}

}  // namespace gateloop::model
