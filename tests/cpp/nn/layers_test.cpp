// Models of mixed layers: weights as the table says, streams equal to the whole, windows equal to
// their definition.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "compare.h"
#include "gateloop/nn.h"

namespace layers_test {

using namespace gateloop::nn;
namespace model = gateloop::model;
using torch::Tensor;

// In float64 the two ways differ by the order of their sums only.
constexpr double kSameTolerance = 1e-10;
constexpr std::int64_t kTokens = 17, kRows = 2, kSteps = 29;

/// Options drawn from all that there are.
TransformerOptions draw(std::mt19937_64& random) {
  const auto one_of = [&](auto... choices) {
    const std::vector<std::common_type_t<decltype(choices)...>> all{choices...};
    return all[random() % all.size()];
  };
  const auto coin = [&] { return random() % 2 == 0; };
  TransformerOptions o;
  o.num_tokens = kTokens;
  o.dim = 12;
  o.depth = one_of(1, 2, 4);
  o.ff_mult = one_of(1, 2);
  o.heads = one_of(1, 3);
  o.dim_head = one_of(2, 4);
  o.post_ln_norm = coin();
  o.tie_embeddings = coin();
  o.sub_ln = coin();
  o.attn_add_swish_gating = coin();
  o.rotary_emb = coin();
  o.data_dependent_rel_pos = coin();
  o.ablate_complex = random() % 4 == 0;
  o.ablate_state_transition = random() % 4 == 0;
  if (coin()) o.dim_gate_looped_attn = 24;
  if (coin()) o.gate_loop_heads = 4;
  if (o.gate_loop_heads && coin()) o.gate_loop_dim_key = 8;
  o.joint_kv = !o.gate_loop_heads && coin();
  if (o.gate_loop_heads && coin()) o.feature_map = FeatureMap::kTaylor;
  o.per_key_transitions = o.feature_map == FeatureMap::kNone && coin();
  o.gate = one_of(Gate::kPolar, Gate::kSigmoid, Gate::kMagnitudePhase);
  o.normalize_input =
      one_of(NormalizeInput::kNone, NormalizeInput::kMean, NormalizeInput::kVariance);
  if (o.gate != Gate::kPolar && coin()) o.transition_bias = {-1.0, 3.0};
  if (o.gate == Gate::kMagnitudePhase && coin()) o.phase_bias = {0.0, 3.0};
  if (coin()) o.window = one_of(1, 2, 5, 11, 64);
  if (coin()) o.simple_gate_loop = model::SimpleGateLoopSpec{.prenorm = coin(), .post_ln = coin()};
  std::string pattern;
  for (std::int64_t i = 0; i < o.depth; ++i)
    pattern.append(i > 0 ? "," : "").append(one_of("gate_loop", "attention", "none"));
  o.layer_pattern = pattern;
  return o;
}

class RandomSpec : public testing::TestWithParam<int> {
 protected:
  RandomSpec() {
    std::mt19937_64 random(static_cast<std::uint64_t>(GetParam()));
    options = draw(random);
    torch::manual_seed(GetParam());
    transformer = Transformer(options);
    transformer->to(torch::kDouble);
    ids = torch::randint(kTokens, {kRows, kSteps}, torch::kLong);
  }
  TransformerOptions options;
  Transformer transformer{nullptr};
  Tensor ids;
};

TEST_P(RandomSpec, WeightsAreThoseOfTheTable) {
  const auto table = model::weight_table(transformer->spec());
  const auto named = transformer->named_parameters();
  ASSERT_EQ(named.size(), table.size()) << model::to_json(options);
  for (std::size_t i = 0; i < table.size(); ++i) {
    EXPECT_EQ(named[i].key(), table[i].name);
    EXPECT_EQ(named[i].value().sizes().vec(), table[i].shape) << table[i].name;
    EXPECT_EQ(named[i].value().requires_grad(), table[i].role != model::Role::kConstant);
  }
}

TEST_P(RandomSpec, CutAnywhereGivesTheWhole) {
  const torch::NoGradGuard no_grad;
  const auto whole = transformer->forward(ids);
  std::mt19937_64 random(7);
  for (int repeat = 0; repeat < 3; ++repeat) {
    TransformerState state;
    std::vector<Tensor> parts;
    for (std::int64_t begin = 0; begin < kSteps;) {
      const auto most = repeat == 0 ? 1 : kSteps - begin;
      const auto length =
          1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(most));
      parts.push_back(transformer->forward(ids.narrow(1, begin, length), &state));
      begin += length;
    }
    EXPECT_LE(channel_error(torch::cat(parts, 1), whole), kSameTolerance)
        << model::to_json(options);
  }
}

TEST_P(RandomSpec, EveryWeightLearns) {
  transformer->loss(ids).backward();
  for (const auto& item : transformer->named_parameters()) {
    if (!item.value().requires_grad()) continue;
    // Transitions are idle under the ablation, and q's norm cancels nothing else.
    if (item.key().find("to_a.") != std::string::npos) continue;
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_TRUE(item.value().grad().isfinite().all().item<bool>()) << item.key();
    EXPECT_GT(item.value().grad().norm().item<double>(), 0) << item.key();
  }
}

/// In float32 a session may be twice as far from the truth as the modules are; the floor is some
/// tens of roundings of 2^-24.
TEST_P(RandomSpec, ASessionReadsTheSame) {
  const torch::NoGradGuard no_grad;
  const auto exact = transformer->forward(ids);
  Transformer narrow(options);
  {
    const auto from = transformer->parameters(), to = narrow->parameters();
    for (std::size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
  }
  const auto theirs = narrow->forward(ids);
  // Relative positions without softmax can leave the range of float32 for either.
  if (!theirs.isfinite().all().item<bool>()) return;
  const auto allowed = 2 * channel_error(theirs, exact) + 64 * 0x1p-24;
  gateloop::runtime::Session session(runtime_model(narrow));
  EXPECT_EQ(session.model().copied_bytes(), 0);
  const std::span all(ids.data_ptr<std::int64_t>(), static_cast<std::size_t>(ids.numel()));
  auto logits = session.read_all(all, kRows);
  const auto read = torch::from_blob(logits.data(), {kRows, kSteps, kTokens});
  EXPECT_LE(channel_error(read.to(torch::kDouble), exact), allowed) << model::to_json(options);
}

INSTANTIATE_TEST_SUITE_P(Layers, RandomSpec, testing::Range(0, 24));

/// Attention in which step i reads steps j with i - window < j <= i, one query at a time.
TEST(Window, EqualsItsDefinition) {
  for (const std::int64_t window : {1, 3, 8, 64}) {
    torch::manual_seed(window);
    CausalFullAttentionOptions options{.dim = 12, .dim_head = 4, .heads = 3, .rotary_emb = true};
    CausalFullAttention full(options);
    options.window = window;
    CausalFullAttention local(options);
    full->to(torch::kDouble), local->to(torch::kDouble);
    {
      const torch::NoGradGuard no_grad;
      const auto from = full->parameters(), to = local->parameters();
      for (std::size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
    }
    const auto x = torch::randn({2, 30, 12}, torch::kDouble);
    const auto y = local(x);
    // Rotary positions are relative: a window alone gives the same.
    for (std::int64_t i = 0; i < x.size(1); ++i) {
      const auto first = std::max<std::int64_t>(0, i - window + 1);
      const auto alone = full(x.narrow(1, first, i - first + 1)).select(1, -1);
      EXPECT_LE(channel_error(y.select(1, i), alone), kSameTolerance)
          << "window " << window << ", step " << i;
    }
  }
}

/// A window holds as many keys as it needs and no more.
TEST(Window, StateIsBounded) {
  CausalFullAttention local(
      CausalFullAttentionOptions{.dim = 8, .dim_head = 4, .heads = 2, .window = 5});
  MixerState state;
  for (int i = 0; i < 20; ++i) local->forward(torch::randn({1, 1, 8}), {}, &state);
  EXPECT_EQ(state.keys.size(2), 4);
  EXPECT_EQ(state.position, 20);
  EXPECT_EQ(state.bytes(), 2 * 4 * 8 * 4);
}

Tensor transitions(const Tensor& z, Gate gate) {
  if (gate == Gate::kSigmoid) return z.sigmoid();
  const auto raw = z.unflatten(-1, {-1, 2});
  if (gate == Gate::kMagnitudePhase)
    return torch::polar(raw.select(-1, 0).sigmoid(), raw.select(-1, 1));
  const auto complex = torch::view_as_complex(raw);
  return torch::polar(complex.abs().sigmoid(), complex.angle());
}

/// 1, x, x²/√2 and the products of two.
Tensor taylor(const Tensor& x) {
  std::vector<Tensor> all = {torch::ones_like(x.narrow(-1, 0, 1)), x, x * x / std::sqrt(2)};
  for (std::int64_t i = 0; i < x.size(-1); ++i)
    all.push_back(x.narrow(-1, i, 1) * x.narrow(-1, 0, i));
  return torch::cat(all, -1);
}

/// What a layer computes from its projections, step by step: (B, T, dim_inner).
Tensor definition(const GateLoopedAttentionOptions& o, const Tensor& qkv, const Tensor& z) {
  const auto heads = o.heads.value_or(o.dim), keys = o.dim_key.value_or(o.dim);
  const auto in_heads = [&](const Tensor& t) { return t.unflatten(-1, {heads, -1}); };
  auto q = in_heads(qkv.narrow(-1, 0, keys)), k = in_heads(qkv.narrow(-1, keys, keys));
  const auto v = o.joint_kv ? torch::ones_like(k) : in_heads(qkv.narrow(-1, 2 * keys, o.dim));
  auto a = transitions(z, o.gate);
  a = o.per_key_transitions ? in_heads(a) : a.unsqueeze(-1);
  if (o.normalize_input == NormalizeInput::kMean) k = k * (1 - a.abs());
  if (o.normalize_input == NormalizeInput::kVariance) k = k * (1 - a.abs().square()).sqrt();
  if (o.feature_map == FeatureMap::kTaylor) {
    q = taylor(q / std::sqrt(static_cast<double>(keys / heads)));
    k = taylor(k);
  }
  auto state = torch::zeros({q.size(0), heads, k.size(3), v.size(3)}, a.options());
  std::vector<Tensor> reads;
  for (std::int64_t t = 0; t < q.size(1); ++t) {
    const auto written = k.select(1, t).unsqueeze(-1) * v.select(1, t).unsqueeze(-2);
    state = a.select(1, t).unsqueeze(-1) * state + written;
    const auto real = state.is_complex() ? torch::real(state) : state;
    reads.push_back((q.select(1, t).unsqueeze(-1) * real).sum(-2));
  }
  return torch::stack(reads, 1).flatten(2);
}

TEST(GateLoop, EveryOptionEqualsItsDefinition) {
  std::vector<GateLoopedAttentionOptions> all;
  for (const Gate gate : {Gate::kPolar, Gate::kSigmoid, Gate::kMagnitudePhase}) {
    for (const auto normalize :
         {NormalizeInput::kNone, NormalizeInput::kMean, NormalizeInput::kVariance}) {
      const GateLoopedAttentionOptions o{.dim = 8, .gate = gate, .normalize_input = normalize};
      all.insert(all.end(), 7, o);
      const auto made = all.end() - 7;
      made[1].joint_kv = true;
      for (int i = 2; i < 7; ++i) made[i].heads = 2;
      made[3].dim_key = 6;
      made[4].per_key_transitions = true;
      made[5].feature_map = FeatureMap::kTaylor;
      made[6].dim_key = 10, made[6].per_key_transitions = true;
    }
  }
  for (const auto& o : all) {
    torch::manual_seed(3);
    GateLoopedAttention layer(o);
    layer->to(torch::kDouble);
    const auto parameters = layer->named_parameters();
    const auto product = [&](const Tensor& x, const char* weight, const Tensor& bias = {}) {
      return torch::nn::functional::linear(x, parameters[weight], bias);
    };
    const auto x = torch::randn({2, 19, 8}, torch::kDouble);
    const auto z = product(x, "to_a.0.weight", parameters["to_a.0.bias"]);
    const auto reads = definition(o, product(x, "to_qkv.weight"), z);
    const auto gated = torch::silu(product(x, "to_gates.0.weight")) * reads;
    const auto expected = product(gated, "to_out.weight");
    EXPECT_LE(channel_error(layer(x), expected), kSameTolerance)
        << static_cast<int>(o.gate) << static_cast<int>(o.normalize_input) << o.joint_kv
        << o.heads.value_or(8) << o.dim_key.value_or(8) << o.per_key_transitions
        << static_cast<int>(o.feature_map);
  }
}

}  // namespace layers_test
