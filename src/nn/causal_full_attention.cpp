#include "gateloop/nn/causal_full_attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "distributed/group.h"
#include "gateloop/distributed_ops.h"
#include "nn/common.h"
#include "nn/kv_cache.h"
#include "nn/packing.h"
#include "nn/rotary_embedding.h"
#include "nn/transition.h"
#include "ops/activations.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kCausalFullAttention = "CausalFullAttention";

model::AttentionSpec spec_of(const CausalFullAttentionOptions& o) {
  return {.heads = o.heads,
          .dim_head = o.dim_head,
          .rotary_emb = o.rotary_emb,
          .data_dependent_rel_pos = o.data_dependent_rel_pos,
          .softmax_normalize = o.softmax_normalize.value_or(!o.data_dependent_rel_pos),
          .add_swish_gating = o.add_swish_gating,
          .frac_gradient_data_dependent_rel_pos = o.frac_gradient_data_dependent_rel_pos,
          .window = o.window};
}

/// t (B, T, H, D), factor (B, T, H, D / 2): each factor scales two neighbouring channels.
Tensor scale_pairs(const Tensor& t, const Tensor& factor) {
  return (t.unflatten(-1, {-1, 2}) * factor.unsqueeze(-1)).flatten(-2).to(t.scalar_type());
}

}  // namespace

CausalFullAttentionImpl::CausalFullAttentionImpl(const CausalFullAttentionOptions& options)
    : CausalFullAttentionImpl(options.dim, spec_of(options)) {}

CausalFullAttentionImpl::CausalFullAttentionImpl(std::int64_t dim, const model::AttentionSpec& spec)
    : dim_(dim), spec_(spec) {
  check_positive(kCausalFullAttention, "dim", dim);
  check_mixer(spec);
  const auto dim_inner = spec.dim_inner();

  // In the reference's order, so that one seed gives both the same weights.
  if (spec.rotary_emb) {
    rotary_emb_ = register_module("rotary_emb", std::make_shared<RotaryEmbedding>(spec.dim_head));
  }
  to_qkv_ = register_nested(*this, "to_qkv", "0", linear(dim, 3 * dim_inner, false));
  if (spec.data_dependent_rel_pos) {
    to_a_ = register_nested(*this, "to_a", "0", linear(dim, dim_inner, false));
  }
  if (spec.add_swish_gating) {
    to_gates_ = register_nested(*this, "to_gates", "0", linear(dim, dim_inner, false));
  }
  to_out_ = register_nested(*this, "to_out", "1", linear(dim_inner, dim, true));
}

Tensor CausalFullAttentionImpl::forward(const Tensor& x, Ablation ablation, MixerState* state,
                                        const Packing& packing) {
  check_sequence(kCausalFullAttention, x, dim_);
  check_packing(kCausalFullAttention, "x", x, packing);
  if (!packing.time_group.empty()) check_blocks(packing);
  const auto extent = Extent::of(kCausalFullAttention, x, packing);
  const auto places = Places::of(packing, x, extent.before);
  TORCH_CHECK(!places || !state, kCausalFullAttention,
              ": state must be null with cu_seqlens or mask, got one at position ",
              state ? state->position : 0);
  const auto in = cast_once(x);
  const auto qkv = to_qkv_(in).chunk(3, -1);
  const auto split = [&](const Tensor& t) {
    return t.unflatten(-1, {spec_.heads, spec_.dim_head});
  };
  auto q = split(qkv[0]), k = split(qkv[1]), v = split(qkv[2]);  // (B, T, H, D)

  const auto position = (state ? state->position : 0) + extent.before;
  if (rotary_emb_) {
    const auto angles =
        places ? rotary_emb_->angles(places->position) : rotary_emb_->angles(position, x.size(1));
    q = RotaryEmbedding::rotate(q, angles);
    k = RotaryEmbedding::rotate(k, angles);
  }
  if (to_a_ && !ablation.state_transition) {
    const auto scale = relative_scale(in, ablation);
    q = scale_pairs(q, scale);
    k = scale_pairs(k, scale.reciprocal());
  }

  q = q.transpose(1, 2), k = k.transpose(1, 2), v = v.transpose(1, 2);  // (B, H, T, D)
  if (!packing.time_group.empty()) {
    std::tie(k, v) = with_steps_before(k, v, state, extent.all, packing.time_group);
  } else if (state && spec_.window) {
    k = append_to_window(state->keys, position, k, *spec_.window);
    v = append_to_window(state->values, position, v, *spec_.window);
  } else if (state) {
    k = append(state->keys, position, k);
    v = append(state->values, position, v);
  }
  if (state) state->position += extent.all;
  Tensor out;
  if (!places) {
    out = attend(q, k, v);
  } else if (packing.time_group.empty()) {
    out = attend_within(q, k, v, *places, /*blocks=*/packing.cu_seqlens.has_value());
  } else {
    const auto past = k.size(2) - q.size(2);
    const auto of_all = Places::of(packing, k.transpose(1, 2), extent.before - past);
    out = attend_in_blocks(q, k, v, of_all->sequence[0]);
  }
  out = out.transpose(1, 2).flatten(-2);
  if (to_gates_) out = ops::swish_gate(to_gates_(in), out);
  return to_out_(out);
}

/// max(Re(a_1 ... a_c), 1e-10) for every pair of channels c of a head, (B, T, H, D / 2).
Tensor CausalFullAttentionImpl::relative_scale(const Tensor& x, Ablation ablation) {
  auto z = to_a_(x);
  scale_gradient(z, spec_.frac_gradient_data_dependent_rel_pos);
  if (ablation.complex) z = drop_imaginary(z);
  const auto a = transition_of(z.unflatten(-1, {spec_.heads, spec_.dim_head}), Gate::kPolar);
  return at::real(a.cumprod(-1)).clamp_min(1e-10);
}

/// q (B, H, T, D), k, v (B, H, S, D) with S ≥ T. The queries are the last T of S steps.
Tensor CausalFullAttentionImpl::attend(const Tensor& q, const Tensor& k, const Tensor& v) const {
  const auto time = q.size(2), steps = k.size(2), past = steps - time;
  const auto window = spec_.window.value_or(steps);
  if (time > window) return attend_in_blocks(q, k, v);
  if (steps <= window && spec_.softmax_normalize && (past == 0 || time == 1)) {
    return at::scaled_dot_product_attention(q, k, v, std::nullopt, /*dropout_p=*/0.0,
                                            /*is_causal=*/past == 0, scale());
  }
  const auto seen = at::ones({time, steps}, q.options().dtype(torch::kBool));
  return weigh(q, k, v, seen.tril(past).triu(past - window + 1));
}

void CausalFullAttentionImpl::check_blocks(const Packing& packing) const {
  TORCH_CHECK(spec_.window, kCausalFullAttention,
              ": time_group must be empty for attention without a window, which would gather all "
              "steps, got '",
              packing.time_group, "'");
  TORCH_CHECK(!packing.mask, kCausalFullAttention, ": mask must be absent over a time_group, got ",
              packing.mask->sizes());
}

/// k, v (B, H, T, D) behind those of the window - 1 steps before this block; with `state`, steps of
/// earlier calls too. `state` then has the last steps of `all_steps` in all blocks.
std::pair<Tensor, Tensor> CausalFullAttentionImpl::with_steps_before(
    Tensor k, Tensor v, MixerState* state, std::int64_t all_steps, const std::string& name) const {
  const auto steps = *spec_.window - 1;
  if (steps == 0) return {k, v};
  const auto group = distributed::find_group(kCausalFullAttention, name);
  const auto rank = group->getRank(), last_rank = group->getSize() - 1;
  std::int64_t kept = 0;
  if (state) {
    kept = check_window(state->keys, state->position, k, *spec_.window);
    check_window(state->values, state->position, v, *spec_.window);
  }
  if (kept > 0 && rank == 0) {
    k = at::cat({state->keys.to(k.scalar_type()), k}, 2);
    v = at::cat({state->values.to(v.scalar_type()), v}, 2);
  }
  const auto last_of = [](const Tensor& t, std::int64_t count) {
    return t.narrow(2, t.size(2) - count, count);
  };
  const auto time = k.size(2), own = std::min(time, steps);
  const auto last = at::cat({last_of(k, own), last_of(v, own)}, 1);
  const auto before = std::get<0>(
      time_sharded::steps_before(last.transpose(1, 2), time, steps, name));  // (B, n, 2 H, D)
  const auto of_both = before.transpose(1, 2).chunk(2, 1);
  k = at::cat({of_both[0], k}, 2), v = at::cat({of_both[1], v}, 2);
  if (state) {
    const auto next = std::min(kept + all_steps, steps);
    const auto known = rank == last_rank ? next : 0;
    auto ends = at::cat({last_of(k, known), last_of(v, known)}, 1).detach();
    if (rank != last_rank) ends = ends.new_empty({ends.size(0), ends.size(1), next, ends.size(3)});
    const auto of_state = distributed::of_last_rank(*group, ends).chunk(2, 1);
    state->keys = of_state[0].clone(), state->values = of_state[1].clone();
  }
  return {k, v};
}

/// attend() of q, k, v (B, H, T, D) within sequences, whose steps lie together if `blocks`. With a
/// mask a window saves nothing.
Tensor CausalFullAttentionImpl::attend_within(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Places& places, bool blocks) const {
  const auto time = q.size(2), window = spec_.window.value_or(time);
  if (blocks && time > window) return attend_in_blocks(q, k, v, places.sequence[0]);
  return weigh(q, k, v, places.visible(window).unsqueeze(1));
}

double CausalFullAttentionImpl::scale() const {
  return 1 / std::sqrt(static_cast<double>(spec_.dim_head));
}

/// q (..., T, D), k, v (..., S, D); visible: bool, broadcast to (..., T, S).
Tensor CausalFullAttentionImpl::weigh(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& visible) const {
  if (!spec_.softmax_normalize)
    return at::matmul(
        at::matmul(q * scale(), k.transpose(-2, -1)).masked_fill(visible.logical_not(), 0), v);
  return at::scaled_dot_product_attention(q, k, v, visible, /*dropout_p=*/0.0,
                                          /*is_causal=*/false, scale());
}

/// attend() of more steps than the window has. Blocks of a window's steps read themselves and the
/// block before: T · 2 window scores a head instead of T². `sequence` (S): that of each step, where
/// there are several.
Tensor CausalFullAttentionImpl::attend_in_blocks(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const std::optional<Tensor>& sequence) const {
  const auto window = *spec_.window, time = q.size(2), past = k.size(2) - time;
  const auto blocks = std::max<std::int64_t>((time + window - 1) / window, 1);
  const auto missing = blocks * window - time;
  const auto batch = q.size(0);
  // (B H, blocks, window, D), from the first query on
  const auto queries =
      at::constant_pad_nd(q, {0, 0, 0, missing}).reshape({-1, blocks, window, spec_.dim_head});
  // (B H, blocks, 2 window, D): zeros stand for steps before the first
  const auto pairs = [&](const Tensor& t) {
    const auto whole = at::constant_pad_nd(t, {0, 0, window - past, missing})
                           .reshape({-1, blocks + 1, window, spec_.dim_head});
    return at::cat({whole.narrow(1, 0, blocks), whole.narrow(1, 1, blocks)}, 2);
  };
  const auto options = q.options().dtype(torch::kBool);
  auto visible = at::ones({window, 2 * window}, options).triu(1).tril(window);
  visible = visible.expand({blocks, window, 2 * window}).clone();
  visible[0].narrow(1, 0, window - past).zero_();
  if (sequence) visible = visible.logical_and(pairs_of_blocks(*sequence, past, blocks, window));
  return weigh(queries, pairs(k), pairs(v), visible)
      .reshape({batch, spec_.heads, blocks * window, spec_.dim_head})
      .narrow(2, 0, time);
}

}  // namespace gateloop::nn
