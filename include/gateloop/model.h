#pragma once

/// What a model is, as data: its layers, the names and shapes of its weights, and what it costs.
/// Modules, loaders, trainer and runtime read this description. Nothing here depends on torch.
///
/// The reference is gateloop-transformer 0.2.5. Shapes: B batch, T time, D channels, H heads.
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace gateloop::model {

/// How the raw transition z becomes a_t.
enum class Gate : std::uint8_t {
  kPolar,    ///< a = σ(|z|) z/|z|, complex: the paper's and the reference's.
  kSigmoid,  ///< a = σ(z), real: one projected channel per head instead of two, about half the
             ///< work.
  kMagnitudePhase,  ///< a = σ(m) e^{iθ}, complex, of z = (m, θ): the paper's section 3.2 with |a|
                    ///< in (0, 1) and a phase of its own, in radians.
};

/// What the recurrence's input is scaled by.
enum class NormalizeInput : std::uint8_t {
  kNone,
  kMean,      ///< 1 - |a|: the state is a running average of inputs that are alike
  kVariance,  ///< √(1 - |a|²): the state has the variance of inputs that are independent
};

/// What queries and keys become before their product (arXiv 2312.04927, section 5.1).
enum class FeatureMap : std::uint8_t {
  kNone,
  /// φ(q) · φ(k) = 1 + s + s²/2 with s = q · k / √K: the Taylor series of e^s.
  kTaylor,
};

/// The values of an enumeration with their names in files and flags.
template <typename Enum>
using Names = std::span<const std::pair<std::string_view, Enum>>;
Names<Gate> names_of(Gate);
Names<NormalizeInput> names_of(NormalizeInput);
Names<FeatureMap> names_of(FeatureMap);
template <typename Enum>
std::string_view name_of(Enum value) {
  for (const auto& [name, named] : names_of(value))
    if (named == value) return name;
  return {};
}

/// The two ablations of the reference: `complex` drops the imaginary part of the raw transition,
/// `state_transition` fixes a_t = 1.
struct Ablation {
  bool complex = false;
  bool state_transition = false;
  bool operator==(const Ablation&) const = default;
};

/// GateLoop as a mixer along time (arXiv 2311.01927, section 3.2).
struct GateLoopSpec {
  std::int64_t dim_inner = 512;  ///< of the values of all heads
  std::int64_t heads = 512;      ///< dim_inner of them are max heads, of one channel each
  /// Width of the keys of all heads, and of the queries; default: dim_inner.
  std::optional<std::int64_t> dim_key = std::nullopt;
  Gate gate = Gate::kPolar;
  /// A transition for every key channel instead of one for every head.
  bool per_key_transitions = false;
  FeatureMap feature_map = FeatureMap::kNone;
  /// One projection to the input kv instead of one to k and one to v (max heads only).
  bool joint_kv = false;
  bool add_swish_gating = true;
  bool sub_ln = false;
  NormalizeInput normalize_input = NormalizeInput::kNone;
  /// Initial bias of what σ takes, spread evenly over [first, second] across the transitions (not
  /// with the polar gate); default: torch's Linear initialisation.
  std::optional<std::pair<double, double>> transition_bias = std::nullopt;
  /// Initial bias of the phases in radians, within [first, second) (magnitude_phase gate only).
  /// Neighbouring transitions are a golden section apart: alike magnitudes get unlike phases.
  std::optional<std::pair<double, double>> phase_bias = std::nullopt;
  double frac_gradient_state_transition = 0.9;
  /// With heads of two and more channels: recompute the states in the backward pass.
  bool checkpoint_gate_looped_attn = true;
  bool operator==(const GateLoopSpec&) const = default;

  std::int64_t dim_keys() const { return dim_key.value_or(dim_inner); }
  /// Channels of a head's value, and of its query and key.
  std::int64_t value_channels() const { return dim_inner / heads; }
  std::int64_t key_channels() const { return dim_keys() / heads; }
  /// What key_channels() are in the state: 1 + K + K (K + 1) / 2 with the Taylor map.
  std::int64_t state_keys() const {
    const std::int64_t k = key_channels();
    return feature_map == FeatureMap::kTaylor ? 1 + k + k * (k + 1) / 2 : k;
  }
  /// Numbers of all heads' states, each of transition_parts().
  std::int64_t state_channels() const { return heads * state_keys() * value_channels(); }
  bool has_max_heads() const {
    return dim_inner == heads && dim_keys() == heads && feature_map == FeatureMap::kNone;
  }
  /// Real numbers of a transition: 2 where it is complex.
  std::int64_t transition_parts() const { return gate == Gate::kSigmoid ? 1 : 2; }
  std::int64_t transitions() const { return per_key_transitions ? dim_keys() : heads; }
  /// Whether the result is multiplied by a matrix at the end.
  bool projects(std::int64_t dim) const { return dim_inner != dim || add_swish_gating; }
};

/// Causal attention.
struct AttentionSpec {
  std::int64_t heads = 8;
  std::int64_t dim_head = 64;
  bool rotary_emb = false;
  bool data_dependent_rel_pos = false;
  bool softmax_normalize = true;
  bool add_swish_gating = true;
  double frac_gradient_data_dependent_rel_pos = 0.9;
  /// Each step attends to itself and the window - 1 steps before it; default: to all before it.
  std::optional<std::int64_t> window = std::nullopt;
  bool operator==(const AttentionSpec&) const = default;

  std::int64_t dim_inner() const { return heads * dim_head; }
};

/// A layer without a mixer: a feed-forward alone.
struct NoMixer {
  bool operator==(const NoMixer&) const = default;
};

using MixerSpec = std::variant<GateLoopSpec, AttentionSpec, NoMixer>;

/// The simplified, real GateLoop with a residual connection: x = layer(x) + x.
struct SimpleGateLoopSpec {
  bool prenorm = true;   ///< RMSNorm before it
  bool post_ln = false;  ///< LayerNorm after it, before the sum
  bool operator==(const SimpleGateLoopSpec&) const = default;
};

/// One layer: an optional simple gate loop, then a mixer, then a feed-forward.
struct LayerSpec {
  MixerSpec mixer;
  std::optional<SimpleGateLoopSpec> simple_gate_loop = std::nullopt;
  std::int64_t ff_mult = 4;  ///< hidden width of the feed-forward, in dim
  bool operator==(const LayerSpec&) const = default;
};

/// A whole model: token embedding, layers, projection to logits.
struct ModelSpec {
  std::int64_t num_tokens = 256;
  std::int64_t dim = 512;
  /// LayerNorm after each residual sum; else RMSNorm before each layer and before the logits.
  bool post_norm = false;
  /// The logits are products with the token embedding.
  bool tie_embeddings = false;
  Ablation ablation = {};
  std::vector<LayerSpec> layers;
  bool operator==(const ModelSpec&) const = default;
};

/// Every option of the reference's Transformer, same names, same defaults; then ours, whose
/// defaults leave the reference's model unchanged.
struct ModelOptions {
  std::int64_t num_tokens = 256;
  std::int64_t dim = 512;
  std::int64_t depth = 6;
  std::int64_t dim_head = 64;  ///< attention only
  std::int64_t heads = 8;      ///< attention only
  std::int64_t ff_mult = 4;
  /// Recompute instead of keeping the (B, T, heads, d, d) states where the head dimension is above
  /// one. With max heads the fused operator always recomputes, block by block.
  bool checkpoint_gate_looped_attn = true;
  bool use_gate_looped_attn = true;
  std::optional<std::int64_t> gate_loop_heads =
      std::nullopt;  ///< default: max heads (the inner dimension)
  bool attn_add_swish_gating = true;
  std::optional<std::int64_t> dim_gate_looped_attn =
      std::nullopt;  ///< inner dimension; default dim
  std::optional<bool> attn_softmax_normalize =
      std::nullopt;  ///< default: not data_dependent_rel_pos
  bool data_dependent_rel_pos = false;
  double frac_gradient_state_transition = 0.9;
  bool ablate_complex = false;
  bool ablate_state_transition = false;
  bool rotary_emb = false;
  bool post_ln_norm = false;
  bool sub_ln = false;

  // Beyond the reference.
  Gate gate = Gate::kPolar;
  NormalizeInput normalize_input = NormalizeInput::kNone;                   ///< see GateLoopSpec
  std::optional<std::pair<double, double>> transition_bias = std::nullopt;  ///< see GateLoopSpec
  std::optional<std::pair<double, double>> phase_bias = std::nullopt;       ///< see GateLoopSpec
  std::optional<std::int64_t> gate_loop_dim_key = std::nullopt;       ///< dim_key of GateLoopSpec
  bool per_key_transitions = false;                                   ///< see GateLoopSpec
  FeatureMap feature_map = FeatureMap::kNone;                         ///< see GateLoopSpec
  bool joint_kv = false;                                              ///< see GateLoopSpec
  std::optional<std::int64_t> window = std::nullopt;                  ///< of attention
  bool tie_embeddings = false;                                        ///< see ModelSpec
  std::optional<SimpleGateLoopSpec> simple_gate_loop = std::nullopt;  ///< in every layer
  /// A pattern of mixers, see parse_layers(); empty: use_gate_looped_attn chooses one for all.
  std::string layer_pattern = {};
  /// One entry a layer; empty: what the options above say.
  std::vector<LayerSpec> layers = {};
};

/// The description of the model that options make. Throws std::invalid_argument naming the option
/// that does not fit, what was expected and what came.
ModelSpec resolve(const ModelOptions& options);

/// Throws std::invalid_argument naming the option of a mixer that does not fit.
void check(const MixerSpec& mixer);
/// The same of a whole model.
void check(const ModelSpec& spec);

/// One layer as the options make it, with the mixer of this name: "gate_loop", "attention" or
/// "none". Throws std::invalid_argument for another name.
LayerSpec layer_of(const ModelOptions& options, std::string_view mixer);

/// "gate_loop", "attention" or "none".
std::string_view mixer_name(const MixerSpec& mixer);

/// A pattern of mixers, repeated to the options' depth: "gate_loop*2,attention" of depth 5 is
/// GateLoop, GateLoop, attention, GateLoop, GateLoop. Throws std::invalid_argument for what is not
/// a pattern and for one longer than the depth.
std::vector<LayerSpec> parse_layers(const std::string& pattern, const ModelOptions& options);

// ---- Weights ------------------------------------------------------------------------------------

enum class Role : std::uint8_t {
  kMatrix,     ///< (out, in), of a product
  kEmbedding,  ///< (num_tokens, dim), rows are read; of a product too where tied
  kVector,     ///< a bias, or the gain of a norm
  kConstant,   ///< not trained
};

struct Weight {
  std::string name;  ///< as in a state_dict
  std::vector<std::int64_t> shape;
  Role role = Role::kMatrix;
  bool operator==(const Weight&) const = default;
  std::int64_t numel() const;
};

/// Every weight of a model, in the order in which its modules register them.
std::vector<Weight> weight_table(const ModelSpec& spec);

/// The initial bias of a transition projection, transition_parts() · transitions() numbers; empty
/// where the spec gives none. A phase that has none starts from 0.
std::vector<double> initial_transition_bias(const GateLoopSpec& spec);

struct NamedShape {
  std::string name;
  std::vector<std::int64_t> shape;
};
/// What keeps `given` from being the weights of this model: "" where nothing, else every missing,
/// unexpected and misshapen one by name.
std::string weight_problems(const ModelSpec& spec, const std::vector<NamedShape>& given);
std::string weight_problems(const std::vector<NamedShape>& expected,
                            const std::vector<NamedShape>& given);

// ---- Cost ---------------------------------------------------------------------------------------

/// What one sequence carries from token to token.
struct StateSize {
  std::int64_t fixed = 0;      ///< bytes, however long the sequence
  std::int64_t per_token = 0;  ///< bytes more for every token read: zero without full attention
  std::int64_t bytes(std::int64_t tokens) const { return fixed + per_token * tokens; }
};
/// `real_bytes`: of a number of the weights; recurrent states have 4 at least.
StateSize state_size(const ModelSpec& spec, std::int64_t real_bytes = 4);

/// Numbers that a training step keeps for its backward pass per token, in a window of `length`.
std::int64_t activations_per_token(const ModelSpec& spec, std::int64_t length);

/// Floating-point operations of a forward pass per token, in a window of `length`: a multiply-add
/// counts two.
std::int64_t flops_per_token(const ModelSpec& spec, std::int64_t length);

/// Whether a text of any length can be read at a constant cost per token: no full attention.
bool has_bounded_state(const ModelSpec& spec);

// ---- Files --------------------------------------------------------------------------------------

/// Which weights of a directory: the last that were saved, or the best at validation.
enum class Weights : std::uint8_t { kLatest, kBest };

// ---- JSON ---------------------------------------------------------------------------------------

/// The model part of config.json: every field of ModelOptions under its own name; those beyond
/// version 0.1 only where they differ from their defaults, so that older programs read the rest.
/// "layers" is the pattern, or the list of layers where there is one.
std::string to_json(const ModelOptions& options);
/// Unknown fields and wrong types are std::runtime_error naming the field. A list of "layers" is
/// repeated to the depth. Its entries are names of mixers, and objects {"mixer": name, ...} with
/// the fields of GateLoopSpec, AttentionSpec and LayerSpec that differ from what the options say.
ModelOptions options_from_json(const std::string& json);
/// A resolved description, every field of every layer, as JSON.
std::string to_json(const ModelSpec& spec);

/// For front ends in other languages: to_json(resolve(options)) with "weights", a list of [name,
/// shape], and in GateLoop layers "derived": "initial_bias" (see initial_transition_bias(), null
/// where it is empty), "transition_channels" of the projection, and "state_shape" of one sequence.
/// `options`: JSON, as to_json(ModelOptions) writes it. Throws as options_from_json() and
/// resolve().
std::string describe(const std::string& options);
/// One layer in the same form, of an entry of "layers" and the width of the model around it.
std::string describe_layer(const std::string& layer, std::int64_t dim);
/// What keeps stored tensors from being the weights of the model of these options: their names,
/// shapes and dtypes, and those of the scales of int8 matrices; "" where nothing does. `tensors`: a
/// JSON object of [dtype, shape] by name, the dtype as safetensors has it.
std::string stored_problems(const std::string& options, const std::string& tensors);

}  // namespace gateloop::model
