#include "gateloop/nn/causal_full_attention.h"

#include <cmath>

#include "nn/common.h"
#include "nn/kv_cache.h"
#include "nn/rotary_embedding.h"
#include "nn/transition.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kCausalFullAttention = "CausalFullAttention";

/// t (B, T, H, D), factor (B, T, H, D / 2): each factor scales two neighbouring channels.
Tensor scale_pairs(const Tensor& t, const Tensor& factor) {
  return (t.unflatten(-1, {-1, 2}) * factor.unsqueeze(-1)).flatten(-2).to(t.scalar_type());
}

}  // namespace

CausalFullAttentionImpl::CausalFullAttentionImpl(const CausalFullAttentionOptions& options)
    : options_(options),
      softmax_normalize_(options.softmax_normalize.value_or(!options.data_dependent_rel_pos)) {
  check_positive(kCausalFullAttention, "dim", options.dim);
  check_positive(kCausalFullAttention, "dim_head", options.dim_head);
  check_positive(kCausalFullAttention, "heads", options.heads);
  TORCH_CHECK(options.dim_head % 2 == 0 || !(options.rotary_emb || options.data_dependent_rel_pos),
              kCausalFullAttention, ": dim_head must be even with ",
              options.rotary_emb ? "rotary_emb" : "data_dependent_rel_pos", ", got ",
              options.dim_head);
  const auto dim = options.dim, dim_inner = options.dim_head * options.heads;

  // In the reference's order, so that one seed gives both the same weights.
  if (options.rotary_emb) {
    rotary_emb_ =
        register_module("rotary_emb", std::make_shared<RotaryEmbedding>(options.dim_head));
  }
  to_qkv_ = register_nested(*this, "to_qkv", "0", linear(dim, 3 * dim_inner, false));
  if (options.data_dependent_rel_pos) {
    to_a_ = register_nested(*this, "to_a", "0", linear(dim, dim_inner, false));
  }
  if (options.add_swish_gating) {
    to_gates_ = register_nested(*this, "to_gates", "0", linear(dim, dim_inner, false));
  }
  to_out_ = register_nested(*this, "to_out", "1", linear(dim_inner, dim, true));
}

Tensor CausalFullAttentionImpl::forward(const Tensor& x, Ablation ablation, MixerState* state) {
  check_sequence(kCausalFullAttention, x, options_.dim);
  const auto in = cast_once(x);
  const auto qkv = project(to_qkv_, in).chunk(3, -1);
  const auto split = [&](const Tensor& t) {
    return t.unflatten(-1, {options_.heads, options_.dim_head});
  };
  auto q = split(qkv[0]), k = split(qkv[1]), v = split(qkv[2]);  // (B, T, H, D)

  const auto position = state ? state->position : 0;
  if (rotary_emb_) {
    const auto angles = rotary_emb_->angles(position, x.size(1));
    q = RotaryEmbedding::rotate(q, angles);
    k = RotaryEmbedding::rotate(k, angles);
  }
  if (to_a_ && !ablation.state_transition) {
    const auto scale = relative_scale(in, ablation);
    q = scale_pairs(q, scale);
    k = scale_pairs(k, scale.reciprocal());
  }

  q = q.transpose(1, 2), k = k.transpose(1, 2), v = v.transpose(1, 2);  // (B, H, T, D)
  if (state) {
    k = append(state->keys, position, k);
    v = append(state->values, position, v);
    state->position += x.size(1);
  }
  auto out = attend(q, k, v).transpose(1, 2).flatten(-2);
  if (to_gates_) out = out * at::silu(project(to_gates_, in));
  return project(to_out_, out);
}

/// max(Re(a_1 ... a_c), 1e-10) for every pair of channels c of a head, (B, T, H, D / 2).
Tensor CausalFullAttentionImpl::relative_scale(const Tensor& x, Ablation ablation) {
  auto z = project(to_a_, x);
  scale_gradient(z, options_.frac_gradient_data_dependent_rel_pos);
  if (ablation.complex) z = drop_imaginary(z);
  const auto a = polar_gate(z.unflatten(-1, {options_.heads, options_.dim_head}));
  return at::real(a.cumprod(-1)).clamp_min(1e-10);
}

/// q (B, H, T, D), k, v (B, H, S, D) with S ≥ T, the queries being the last T of S steps.
Tensor CausalFullAttentionImpl::attend(const Tensor& q, const Tensor& k, const Tensor& v) const {
  const auto time = q.size(2), past = k.size(2) - time;
  const auto scale = 1 / std::sqrt(static_cast<double>(options_.dim_head));
  if (!softmax_normalize_) {
    return at::matmul(at::matmul(q * scale, k.transpose(-2, -1)).tril_(past), v);
  }
  std::optional<Tensor> visible;
  if (past > 0 && time > 1) {
    visible = at::ones({time, past + time}, q.options().dtype(torch::kBool)).tril_(past);
  }
  return at::scaled_dot_product_attention(q, k, v, visible, /*dropout_p=*/0.0,
                                          /*is_causal=*/past == 0, scale);
}

}  // namespace gateloop::nn
