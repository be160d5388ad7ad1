#include "gateloop/nn/gate_looped_attention.h"

#include "gateloop/ops.h"
#include "nn/common.h"
#include "nn/packing.h"
#include "nn/transition.h"

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
          .gate = o.gate,
          .joint_kv = o.joint_kv,
          .add_swish_gating = o.add_swish_gating,
          .sub_ln = o.sub_ln,
          .normalize_input = o.normalize_input,
          .transition_bias = o.transition_bias,
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
  to_qkv_ = register_module("to_qkv", linear(dim, (spec.joint_kv ? 2 : 3) * inner, false));
  to_a_ =
      register_nested(*this, "to_a", "0", linear(dim, spec.transition_parts() * spec.heads, true));
  if (spec.sub_ln) {
    sub_ln_ =
        register_module("maybe_sub_ln", torch::nn::LayerNorm(torch::nn::LayerNormOptions({inner})));
  }
  if (spec.add_swish_gating) {
    to_gates_ = register_nested(*this, "to_gates", "0", linear(dim, inner, false));
  }
  if (spec.projects(dim)) to_out_ = register_module("to_out", linear(inner, dim, false));
  if (spec.transition_bias) {
    const auto [first, last] = *spec.transition_bias;
    const torch::NoGradGuard no_grad;
    to_a_->bias.copy_(at::linspace(first, last, spec.heads));
  }
}

Tensor GateLoopedAttentionImpl::forward(const Tensor& x, Ablation ablation, MixerState* state,
                                        const Packing& packing) {
  check_sequence(kGateLoopedAttention, x, dim_);
  check_packing(kGateLoopedAttention, "x", x, packing);
  const auto in = cast_once(x);
  auto y = spec_.has_max_heads() ? max_heads(in, ablation, state, packing)
                                 : wide_heads(in, ablation, state, packing);
  if (state) state->position += x.size(1);
  if (sub_ln_) y = sub_ln_(y);
  if (to_gates_) y = at::silu(to_gates_(in)) * y;
  return to_out_ ? to_out_(y) : y;
}

/// Raw transition z (B, T, 2 heads), or (B, T, heads) for the sigmoid gate.
Tensor GateLoopedAttentionImpl::transition(const Tensor& x, Ablation ablation) {
  const auto z = to_a_(x);
  scale_gradient(z, spec_.frac_gradient_state_transition);
  return ablation.complex && spec_.gate == Gate::kPolar ? drop_imaginary(z) : z;
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
  const auto initial = initial_state(state);
  const auto& [cu_seqlens, mask] = packing;

  Tensor y, final_state;
  if (ablation.state_transition) {
    // With a = 1, normalize_input would scale every input by zero: the sum stays a plain one.
    std::tie(y, final_state) =
        linear_recurrence(one(), kv(), initial, /*reverse=*/false, cu_seqlens, mask);
    y = q * y;
  } else if (spec_.gate == Gate::kPolar) {
    std::tie(y, final_state) =
        polar_gate_loop(q, projected[1], spec_.joint_kv ? one() : projected[2],
                        transition(x, ablation), initial, /*reverse=*/false, cu_seqlens, mask);
  } else {
    std::tie(y, final_state) =
        simple_gate_loop(q, kv(), transition(x, ablation), initial,
                         /*reverse=*/false, spec_.normalize_input, cu_seqlens, mask);
  }
  if (state) state->recurrence = final_state.detach();
  return y;
}

Tensor GateLoopedAttentionImpl::wide_heads(const Tensor& x, Ablation ablation, MixerState* state,
                                           const Packing& packing) {
  const auto qkv = to_qkv_(x).unflatten(-1, {3, spec_.heads, -1}).unbind(2);
  const auto &q = qkv[0], &v = qkv[2];
  auto k = qkv[1];

  Tensor a;
  if (ablation.state_transition) {
    const auto wide = q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
    a = at::ones({1, 1, 1}, q.options().dtype(wide)).expand({q.size(0), q.size(1), spec_.heads});
  } else if (spec_.gate == Gate::kPolar) {
    a = polar_gate(transition(x, ablation));
  } else {
    const auto z = transition(x, ablation);
    a = at::sigmoid(z.scalar_type() == torch::kDouble ? z : z.to(torch::kFloat));
    if (spec_.normalize_input) k = (k * (1 - a).unsqueeze(-1)).to(k.scalar_type());
  }
  const auto [y, final_state] = gate_loop(q, k, v, a, initial_state(state), /*reverse=*/false,
                                          packing.cu_seqlens, packing.mask);
  if (state) state->recurrence = final_state.detach();
  return y.flatten(-2);
}

}  // namespace gateloop::nn
