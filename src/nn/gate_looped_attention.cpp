#include "gateloop/nn/gate_looped_attention.h"

#include "gateloop/ops.h"
#include "nn/common.h"
#include "nn/transition.h"
#include "nn/wide_heads.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kGateLoopedAttention = "GateLoopedAttention";

std::optional<Tensor> initial_state(const MixerState* state) {
  if (!state || !state->recurrence.defined()) return std::nullopt;
  return state->recurrence;
}

}  // namespace

GateLoopedAttentionImpl::GateLoopedAttentionImpl(const GateLoopedAttentionOptions& options)
    : options_(options),
      dim_inner_(options.dim_inner.value_or(options.dim)),
      heads_(options.heads.value_or(dim_inner_)) {
  const auto dim = options.dim;
  check_positive(kGateLoopedAttention, "dim", dim);
  check_positive(kGateLoopedAttention, "dim_inner", dim_inner_);
  check_positive(kGateLoopedAttention, "heads", heads_);
  TORCH_CHECK(dim_inner_ % heads_ == 0, kGateLoopedAttention, ": heads must divide dim_inner, got ",
              heads_, " heads for dim_inner ", dim_inner_);
  const bool polar = options.gate == Gate::kPolar;
  TORCH_CHECK(!(polar && options.normalize_input), kGateLoopedAttention,
              ": normalize_input needs the sigmoid gate, got the polar gate");
  TORCH_CHECK(!(polar && options.transition_bias), kGateLoopedAttention,
              ": transition_bias needs the sigmoid gate, got the polar gate");

  // In the reference's order, so that one seed gives both the same weights.
  to_qkv_ = register_module("to_qkv", linear(dim, 3 * dim_inner_, false));
  to_a_ = register_nested(*this, "to_a", "0", linear(dim, polar ? 2 * heads_ : heads_, true));
  if (options.sub_ln) {
    sub_ln_ = register_module("maybe_sub_ln",
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({dim_inner_})));
  }
  if (options.add_swish_gating) {
    to_gates_ = register_nested(*this, "to_gates", "0", linear(dim, dim_inner_, false));
  }
  if (dim_inner_ != dim || options.add_swish_gating) {
    to_out_ = register_module("to_out", linear(dim_inner_, dim, false));
  }
  if (options.transition_bias) {
    const auto [first, last] = *options.transition_bias;
    const torch::NoGradGuard no_grad;
    to_a_->bias.copy_(at::linspace(first, last, heads_));
  }
}

Tensor GateLoopedAttentionImpl::forward(const Tensor& x, Ablation ablation, MixerState* state) {
  check_sequence(kGateLoopedAttention, x, options_.dim);
  const auto in = cast_once(x);
  auto y = heads_ == dim_inner_ ? max_heads(in, ablation, state) : wide_heads(in, ablation, state);
  if (state) state->position += x.size(1);
  if (sub_ln_) y = sub_ln_(y);
  if (to_gates_) y = at::silu(project(to_gates_, in)) * y;
  return to_out_ ? project(to_out_, y) : y;
}

/// Raw transition z (B, T, 2 heads), or (B, T, heads) for the sigmoid gate.
Tensor GateLoopedAttentionImpl::transition(const Tensor& x, Ablation ablation) {
  const auto z = project(to_a_, x);
  scale_gradient(z, options_.frac_gradient_state_transition);
  return ablation.complex && options_.gate == Gate::kPolar ? drop_imaginary(z) : z;
}

Tensor GateLoopedAttentionImpl::max_heads(const Tensor& x, Ablation ablation, MixerState* state) {
  const auto qkv = project(to_qkv_, x).chunk(3, -1);
  const auto &q = qkv[0], &k = qkv[1], &v = qkv[2];
  const auto initial = initial_state(state);

  Tensor y, final_state;
  if (ablation.state_transition) {
    const auto kv = k * v;
    // With a = 1, normalize_input would scale every input by zero: the sum stays a plain one.
    const auto one = at::ones({1, 1, dim_inner_}, kv.options()).expand_as(kv);
    std::tie(y, final_state) = linear_recurrence(one, kv, initial);
    y = q * y;
  } else if (options_.gate == Gate::kPolar) {
    std::tie(y, final_state) = polar_gate_loop(q, k, v, transition(x, ablation), initial);
  } else {
    std::tie(y, final_state) = simple_gate_loop(q, k * v, transition(x, ablation), initial,
                                                /*reverse=*/false, options_.normalize_input);
  }
  if (state) state->recurrence = final_state.detach();
  return y;
}

Tensor GateLoopedAttentionImpl::wide_heads(const Tensor& x, Ablation ablation, MixerState* state) {
  const auto qkv = project(to_qkv_, x).unflatten(-1, {3, heads_, -1}).unbind(2);
  const auto &q = qkv[0], &v = qkv[2];
  auto k = qkv[1];

  Tensor a;
  if (ablation.state_transition) {
    const auto wide = q.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
    a = at::ones({1, 1, 1}, q.options().dtype(wide)).expand({q.size(0), q.size(1), heads_});
  } else if (options_.gate == Gate::kPolar) {
    a = polar_gate(transition(x, ablation));
  } else {
    const auto z = transition(x, ablation);
    a = at::sigmoid(z.scalar_type() == torch::kDouble ? z : z.to(torch::kFloat));
    if (options_.normalize_input) k = k * (1 - a).unsqueeze(-1);
  }
  const auto [y, final_state] =
      wide_heads_read(q, k, v, a, initial_state(state), options_.checkpoint_gate_looped_attn);
  if (state) state->recurrence = final_state;
  return y.flatten(-2).to(q.scalar_type());
}

}  // namespace gateloop::nn
