// Models of mixed layers: weights as the table says, streams equal to the whole, windows equal to
// their definition.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <random>
#include <span>
#include <string>
#include <vector>

#include "compare.h"
#include "gateloop/nn.h"

namespace {

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
  o.joint_kv = !o.gate_loop_heads && coin();
  if (coin()) {
    o.gate = Gate::kSigmoid;
    o.normalize_input = coin();
    if (coin()) o.transition_bias = {-1.0, 3.0};
  }
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
    EXPECT_LE(relative_error(torch::cat(parts, 1), whole), kSameTolerance)
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
  const auto allowed = 2 * relative_error(theirs, exact) + 64 * 0x1p-24;
  gateloop::runtime::Session session(runtime_model(narrow));
  EXPECT_EQ(session.model().copied_bytes(), 0);
  const std::span all(ids.data_ptr<std::int64_t>(), static_cast<std::size_t>(ids.numel()));
  auto logits = session.read_all(all, kRows);
  const auto read = torch::from_blob(logits.data(), {kRows, kSteps, kTokens});
  EXPECT_LE(relative_error(read.to(torch::kDouble), exact), allowed) << model::to_json(options);
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
      EXPECT_LE(relative_error(y.select(1, i), alone), kSameTolerance)
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

/// With max heads joint_kv is GateLoop whose k is one everywhere.
TEST(JointKv, EqualsTwoProjectionsWithKOfOne) {
  for (const Gate gate : {Gate::kPolar, Gate::kSigmoid}) {
    torch::manual_seed(3);
    GateLoopedAttentionOptions options{.dim = 8, .gate = gate, .joint_kv = true};
    GateLoopedAttention joint(options);
    joint->to(torch::kDouble);
    const auto parameters = joint->named_parameters();
    ASSERT_EQ(parameters["to_qkv.weight"].size(0), 16);
    const auto x = torch::randn({2, 19, 8}, torch::kDouble);
    const auto projected =
        torch::nn::functional::linear(x, parameters["to_qkv.weight"]).chunk(2, -1);
    const auto z =
        torch::nn::functional::linear(x, parameters["to_a.0.weight"], parameters["to_a.0.bias"]);
    Tensor a;
    if (gate == Gate::kPolar) {
      const auto raw = torch::view_as_complex(z.unflatten(-1, {-1, 2}));
      a = torch::polar(raw.abs().sigmoid(), raw.angle());
    } else {
      a = z.sigmoid();
    }
    auto h = torch::zeros_like(a.select(1, 0));
    std::vector<Tensor> reads;
    for (std::int64_t t = 0; t < x.size(1); ++t) {
      h = a.select(1, t) * h + projected[1].select(1, t);
      reads.push_back(projected[0].select(1, t) * (h.is_complex() ? torch::real(h) : h));
    }
    const auto gates = torch::nn::functional::linear(x, parameters["to_gates.0.weight"]);
    const auto expected = torch::nn::functional::linear(torch::silu(gates) * torch::stack(reads, 1),
                                                        parameters["to_out.weight"]);
    EXPECT_LE(relative_error(joint(x), expected), kSameTolerance);
  }
}

}  // namespace
