#include "gateloop/nn/gate_looped_attention.h"

#include <cmath>

#include "nn/common.h"
#include "nn/packing.h"
#include "nn/scans.h"
#include "nn/transition.h"
#include "ops/activations.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kGateLoopedAttention = "GateLoopedAttention";

std::optional<Tensor> initial_state(const MixerState* state) {
  if (!state || !state->recurrence.defined()) return std::nullopt;
  return state->recurrence;
}

model::GateLoopSpec spec_of(const GateLoopedAttentionOptions& o) {
  const auto dim_inner = o.dim_inner.value_or(o.dim);
  return {.dim_inner = dim_inner,
          .heads = o.heads.value_or(dim_inner),
          .dim_key = o.dim_key,
          .gate = o.gate,
          .per_key_transitions = o.per_key_transitions,
          .feature_map = o.feature_map,
          .joint_kv = o.joint_kv,
          .add_swish_gating = o.add_swish_gating,
          .sub_ln = o.sub_ln,
          .normalize_input = o.normalize_input,
          .transition_bias = o.transition_bias,
          .phase_bias = o.phase_bias,
          .frac_gradient_state_transition = o.frac_gradient_state_transition,
          .checkpoint_gate_looped_attn = o.checkpoint_gate_looped_attn};
}

}  // namespace

GateLoopedAttentionImpl::GateLoopedAttentionImpl(const GateLoopedAttentionOptions& options)
    : GateLoopedAttentionImpl(options.dim, spec_of(options)) {}

GateLoopedAttentionImpl::GateLoopedAttentionImpl(std::int64_t dim, const model::GateLoopSpec& spec)
    : dim_(dim), spec_(spec) {
  check_positive(kGateLoopedAttention, "dim", dim);
  check_mixer(spec);
  const auto inner = spec.dim_inner;

  // In the reference's order, so that one seed gives both the same weights.
  const auto keys = (spec.joint_kv ? 1 : 2) * spec.dim_keys();
  to_qkv_ = register_module("to_qkv", linear(dim, keys + inner, false));
  to_a_ = register_nested(*this, "to_a", "0",
                          linear(dim, spec.transition_parts() * spec.transitions(), true));
  if (spec.sub_ln) {
    sub_ln_ =
        register_module("maybe_sub_ln", torch::nn::LayerNorm(torch::nn::LayerNormOptions({inner})));
  }
  if (spec.add_swish_gating) {
    to_gates_ = register_nested(*this, "to_gates", "0", linear(dim, inner, false));
  }
  if (spec.projects(dim)) to_out_ = register_module("to_out", linear(inner, dim, false));
  if (const auto bias = model::initial_transition_bias(spec); !bias.empty()) {
    const torch::NoGradGuard no_grad;
    to_a_->bias.copy_(at::tensor(bias, at::kDouble));
  }
}

Tensor GateLoopedAttentionImpl::forward(const Tensor& x, Ablation ablation, MixerState* state,
                                        const Packing& packing) {
  check_sequence(kGateLoopedAttention, x, dim_);
  check_packing(kGateLoopedAttention, "x", x, packing);
  const auto in = cast_once(x);
  auto y = spec_.has_max_heads() ? max_heads(in, ablation, state, packing)
                                 : wide_heads(in, ablation, state, packing);
  if (state) state->position += Extent::of(kGateLoopedAttention, x, packing).all;
  if (sub_ln_) y = sub_ln_(y);
  if (to_gates_) y = ops::swish_gate(to_gates_(in), y);
  return to_out_ ? to_out_(y) : y;
}

/// Raw transitions z (B, T, parts · transitions).
Tensor GateLoopedAttentionImpl::transition(const Tensor& x, Ablation ablation) {
  const auto z = to_a_(x);
  scale_gradient(z, spec_.frac_gradient_state_transition);
  return ablation.complex && spec_.transition_parts() == 2 ? drop_imaginary(z) : z;
}

/// The recurrence's input, k (B, T, H, K) or with max heads k or k v (B, T, D), scaled.
Tensor GateLoopedAttentionImpl::scaled(const Tensor& input, const Tensor& z) const {
  if (spec_.normalize_input == NormalizeInput::kNone) return input;
  auto scale = input_scale(z, spec_.gate, spec_.normalize_input);
  if (input.dim() == 4)
    scale =
        spec_.per_key_transitions ? scale.unflatten(-1, {spec_.heads, -1}) : scale.unsqueeze(-1);
  return (input * scale).to(input.scalar_type());
}

Tensor GateLoopedAttentionImpl::max_heads(const Tensor& x, Ablation ablation, MixerState* state,
                                          const Packing& packing) {
  // q, k, v, or with joint_kv q and kv.
  const auto projected = to_qkv_(x).chunk(spec_.joint_kv ? 2 : 3, -1);
  const auto& q = projected[0];
  const auto kv = [&] { return spec_.joint_kv ? projected[1] : projected[1] * projected[2]; };
  const auto one = [&] {
    return at::ones({1, 1, spec_.dim_inner}, q.options()).expand_as(q);  // read in place
  };
  const Scans scans(packing, initial_state(state), /*reverse=*/false);

  Tensor y, final_state;
  if (ablation.state_transition) {
    // With a = 1, normalize_input would scale every input by zero: the sum stays a plain one.
    std::tie(y, final_state) = scans.linear_recurrence(one(), kv());
    y = q * y;
  } else if (spec_.gate == Gate::kSigmoid) {
    const auto z = transition(x, ablation);
    const bool mean = spec_.normalize_input == NormalizeInput::kMean;
    std::tie(y, final_state) = scans.simple_gate_loop(q, mean ? kv() : scaled(kv(), z), z, mean);
  } else {
    const auto z = transition(x, ablation);
    const auto k = scaled(projected[1], z), v = spec_.joint_kv ? one() : projected[2];
    std::tie(y, final_state) = spec_.gate == Gate::kPolar
                                   ? scans.polar_gate_loop(q, k, v, z)
                                   : scans.gate_loop(q, k, v, transition_of(z, spec_.gate));
  }
  if (state) state->recurrence = final_state.detach();
  return y;
}

Tensor GateLoopedAttentionImpl::wide_heads(const Tensor& x, Ablation ablation, MixerState* state,
                                           const Packing& packing) {
  const auto keys = spec_.dim_keys();
  const auto qkv = to_qkv_(x).split_with_sizes({keys, keys, spec_.dim_inner}, -1);
  const auto in_heads = [&](const Tensor& t) { return t.unflatten(-1, {spec_.heads, -1}); };
  auto q = in_heads(qkv[0]), k = in_heads(qkv[1]);
  const auto v = in_heads(qkv[2]);

  Tensor a;
  if (ablation.state_transition) {
    const auto wide = q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
    a = at::ones({1, 1, 1}, q.options().dtype(wide)).expand({q.size(0), q.size(1), spec_.heads});
  } else {
    const auto z = transition(x, ablation);
    a = transition_of(z, spec_.gate);
    if (spec_.per_key_transitions) a = in_heads(a);
    k = scaled(k, z);
  }
  const bool maps = spec_.feature_map == FeatureMap::kTaylor;
  if (maps) q = q / std::sqrt(static_cast<double>(spec_.key_channels()));
  const auto [y, final_state] = Scans(packing, initial_state(state), /*reverse=*/false)
                                    .gate_loop(q, k, v, a, model::name_of(spec_.feature_map));
  if (state) state->recurrence = final_state.detach();
  return y.flatten(-2);
}

}  // namespace gateloop::nn
