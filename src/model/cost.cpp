// What mixers differ in: their states, the activations they keep, their operations.
#include <algorithm>

#include "gateloop/model.h"
#include "model/layer_state.h"

namespace gateloop::model {
namespace {

constexpr std::int64_t kRecurrentBytes = 4;  // float32, or wider where the weights are

struct StateSizes {
  bool has_transitions;

  LayerStateSizes operator()(const GateLoopSpec& s) const {
    return {.recurrence = s.state_channels() * (has_transitions ? s.transition_parts() : 1)};
  }
  LayerStateSizes operator()(const AttentionSpec& s) const {
    return {.heads = s.heads, .dim_head = s.dim_head, .window = s.window.value_or(0)};
  }
  LayerStateSizes operator()(const NoMixer&) const { return {}; }
};

std::int64_t context(const AttentionSpec& s, std::int64_t length) {
  return std::min(length, s.window.value_or(length));
}

struct Activations {
  std::int64_t length;

  std::int64_t operator()(const GateLoopSpec& s) const {
    // q, k; v, y, the swish gate before and after, their product; z as (re, im).
    const std::int64_t projected = 2 * s.dim_keys() + 5 * s.dim_inner + 2 * s.transitions();
    // Without a fused kernel the transition, its input and the states, complex.
    if (s.has_max_heads())
      return projected + (s.gate == Gate::kMagnitudePhase ? 6 * s.dim_inner : 0);
    // The transitions, and one of so many steps' states.
    const std::int64_t steps = s.per_key_transitions ? 16 : 64;
    return projected + 2 * s.transitions() + 2 * s.state_channels() / steps;
  }
  std::int64_t operator()(const AttentionSpec& s) const {
    // q, k, v with and without rotation, transitions, gates; scores before and after softmax.
    return 12 * s.dim_inner() + 3 * s.heads * context(s, length);
  }
  std::int64_t operator()(const NoMixer&) const { return 0; }
};

/// Beside products with weights.
struct Flops {
  std::int64_t length;

  std::int64_t operator()(const GateLoopSpec& s) const {
    // A complex multiply-add (8), the input (1) and the read-out (2) per channel of the state.
    return 11 * s.state_channels();
  }
  std::int64_t operator()(const AttentionSpec& s) const {
    // Scores and sums of values, over half of a full context on average.
    const std::int64_t steps = s.window ? context(s, length) : (length + 1) / 2;
    return 4 * s.dim_inner() * steps;
  }
  std::int64_t operator()(const NoMixer&) const { return 0; }
};

}  // namespace

LayerStateSizes layer_state_sizes(const ModelSpec& spec, const LayerSpec& layer) {
  LayerStateSizes sizes =
      std::visit(StateSizes{.has_transitions = !spec.ablation.state_transition}, layer.mixer);
  if (layer.simple_gate_loop) sizes.simple = spec.dim;
  return sizes;
}

StateSize state_size(const ModelSpec& spec, std::int64_t real_bytes) {
  StateSize total;
  for (const LayerSpec& layer : spec.layers) {
    const LayerStateSizes sizes = layer_state_sizes(spec, layer);
    total.fixed += (sizes.simple + sizes.recurrence) * std::max(real_bytes, kRecurrentBytes);
    const std::int64_t step = 2 * sizes.heads * sizes.dim_head * real_bytes;
    if (sizes.window > 0) {
      total.fixed += sizes.window * step;
    } else {
      total.per_token += step;
    }
  }
  return total;
}

std::int64_t activations_per_token(const ModelSpec& spec, std::int64_t length) {
  std::int64_t total = 3 * spec.num_tokens;  // logits, their softmax, their gradient
  for (const LayerSpec& layer : spec.layers) {
    // Residual stream and norms, the hidden layer before and after its activation.
    total += 6 * spec.dim + 3 * layer.ff_mult * spec.dim;
    total += std::visit(Activations{length}, layer.mixer);
    if (layer.simple_gate_loop) total += 6 * spec.dim;  // norm, q, kv, z, y, sum
  }
  return total;
}

std::int64_t flops_per_token(const ModelSpec& spec, std::int64_t length) {
  std::int64_t total = 0;
  for (const Weight& weight : weight_table(spec)) {
    if (weight.role == Role::kMatrix) total += 2 * weight.numel();
  }
  if (spec.tie_embeddings) total += 2 * spec.num_tokens * spec.dim;
  for (const LayerSpec& layer : spec.layers) {
    total += std::visit(Flops{length}, layer.mixer);
    if (layer.simple_gate_loop) total += 3 * spec.dim;
  }
  return total;
}

bool has_bounded_state(const ModelSpec& spec) { return state_size(spec).per_token == 0; }

}  // namespace gateloop::model
