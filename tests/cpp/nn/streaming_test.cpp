// A sequence cut anywhere and carried through its state gives what one call gives.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "compare.h"
#include "gateloop/nn.h"
#include "nn/kv_cache.h"

namespace streaming_test {

using namespace gateloop::nn;
using torch::Tensor;

// In float64 the two ways differ by the order of their sums only; what a wrong state would do is
// many orders larger.
constexpr double kTolerance = 1e-13;
constexpr std::int64_t kBatch = 2, kTime = 33, kDim = 24;

using GateLoopOptions = GateLoopedAttentionOptions;
using AttentionOptions = CausalFullAttentionOptions;

struct Case {
  std::string name;
  std::function<std::shared_ptr<SpatialMixer>()> make;
  Ablation ablation = {};
};

Case gate_loop(std::string name, GateLoopOptions options, Ablation ablation = {}) {
  options.dim = kDim;
  return {name, [=] { return std::make_shared<GateLoopedAttentionImpl>(options); }, ablation};
}

Case attention(std::string name, AttentionOptions options, Ablation ablation = {}) {
  options.dim = kDim;
  options.dim_head = 4;
  options.heads = 3;
  return {name, [=] { return std::make_shared<CausalFullAttentionImpl>(options); }, ablation};
}

std::vector<Case> cases() {
  constexpr Ablation no_imaginary{.complex = true}, no_transition{.state_transition = true};
  return {
      gate_loop("polar", {}),
      gate_loop("polar_ablate_complex", {}, no_imaginary),
      gate_loop("polar_ablate_state_transition", {}, no_transition),
      gate_loop("inner_dim_sub_ln", {.dim_inner = 16, .sub_ln = true}),
      gate_loop("no_swish", {.add_swish_gating = false}),
      gate_loop("sigmoid", {.gate = Gate::kSigmoid}),
      gate_loop("sigmoid_ablate_state_transition", {.gate = Gate::kSigmoid}, no_transition),
      gate_loop("sigmoid_normalized",
                {.gate = Gate::kSigmoid, .normalize_input = NormalizeInput::kMean}),
      gate_loop("heads", {.heads = 4}),
      gate_loop("heads_ablate_complex", {.heads = 4}, no_imaginary),
      gate_loop("heads_ablate_state_transition", {.heads = 4}, no_transition),
      gate_loop("heads_sigmoid_normalized",
                {.heads = 4, .gate = Gate::kSigmoid, .normalize_input = NormalizeInput::kMean}),
      gate_loop("magnitude_phase",
                {.gate = Gate::kMagnitudePhase, .normalize_input = NormalizeInput::kVariance}),
      gate_loop(
          "heads_per_key",
          {.heads = 4, .gate = Gate::kMagnitudePhase, .dim_key = 20, .per_key_transitions = true}),
      gate_loop("heads_taylor", {.heads = 4, .feature_map = FeatureMap::kTaylor}),
      attention("attention", {.add_swish_gating = true}),
      attention("attention_no_softmax", {.softmax_normalize = false}),
      attention("attention_rotary", {.rotary_emb = true}),
      attention("relative", {.data_dependent_rel_pos = true}),
      attention("relative_softmax", {.data_dependent_rel_pos = true, .softmax_normalize = true}),
      attention("relative_rotary", {.rotary_emb = true, .data_dependent_rel_pos = true}),
      attention("relative_ablate_complex", {.data_dependent_rel_pos = true}, no_imaginary),
      attention("relative_ablate_state_transition", {.data_dependent_rel_pos = true},
                no_transition),
  };
}

/// Lengths that add up to `time`; some are zero.
std::vector<std::int64_t> random_cuts(std::int64_t time, std::mt19937& random) {
  std::vector<std::int64_t> lengths;
  while (time > 0) {
    lengths.push_back(std::uniform_int_distribution<std::int64_t>(0, time)(random));
    time -= lengths.back();
  }
  return lengths;
}

using Step = std::function<Tensor(const Tensor& part)>;
Tensor stream(const Tensor& sequence, const std::vector<std::int64_t>& lengths, const Step& step) {
  std::vector<Tensor> parts;
  std::int64_t start = 0;
  for (const auto length : lengths) {
    parts.push_back(step(sequence.narrow(1, start, length)));
    start += length;
  }
  return torch::cat(parts, 1);
}

class Streaming : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::manual_seed(1);
    layer_ = GetParam().make();
    layer_->to(torch::kDouble);
    x_ = torch::randn({kBatch, kTime, kDim}, torch::kDouble);
  }

  Tensor full() { return layer_->forward(x_, GetParam().ablation); }
  Tensor streamed(const std::vector<std::int64_t>& lengths) {
    state_ = {};
    return stream(x_, lengths, [&](const Tensor& part) {
      return layer_->forward(part, GetParam().ablation, &state_);
    });
  }

  std::shared_ptr<SpatialMixer> layer_;
  Tensor x_;
  MixerState state_;
};

TEST_P(Streaming, StepByStep) {
  const torch::NoGradGuard no_grad;
  expect_close(streamed(std::vector<std::int64_t>(kTime, 1)), full(), kTolerance);
  EXPECT_EQ(state_.position, kTime);
  EXPECT_GT(state_.bytes(), 0);
}

TEST_P(Streaming, CutAnywhere) {
  const torch::NoGradGuard no_grad;
  std::mt19937 random(7);
  const auto expected = full();
  for (int i = 0; i < 8; ++i) {
    expect_close(streamed(random_cuts(kTime, random)), expected, kTolerance);
  }
}

// With gradients on, the state is cut off from the graph and the outputs are the same.
TEST_P(Streaming, KeepsNoGraph) {
  const auto half = kTime / 2;
  const auto y = streamed({half, kTime - half});
  expect_close(y, full(), kTolerance);
  y.sum().backward();
  for (const auto& tensor : {state_.recurrence, state_.keys, state_.values}) {
    EXPECT_TRUE(!tensor.defined() || !tensor.requires_grad());
  }
}

// A state is a value: neither continuation changes the other.
TEST_P(Streaming, TwoContinuationsOfOnePrefixAreTwoRuns) {
  const torch::NoGradGuard no_grad;
  const auto forward = [&](const Tensor& part, MixerState& state) {
    return layer_->forward(part, GetParam().ablation, &state);
  };
  constexpr std::int64_t kPrefix = 9;
  const auto other = -x_.flip(1);
  // In two parts: after the second a cache has room, which both continuations could write to.
  const auto read_prefix = [&](MixerState& state) {
    forward(x_.narrow(1, 0, kPrefix), state);
    forward(x_.narrow(1, kPrefix, 1), state);
  };
  const auto alone = [&](const Tensor& x) {
    MixerState state;
    read_prefix(state);
    return stream(x, {1, 1, 3, 20}, [&](const Tensor& part) { return forward(part, state); });
  };
  MixerState one;
  read_prefix(one);
  MixerState two = one;
  std::vector<Tensor> ones, twos;
  std::int64_t start = 0;
  for (const std::int64_t length : {1, 1, 3, 20}) {
    ones.push_back(forward(x_.narrow(1, start, length), one));
    twos.push_back(forward(other.narrow(1, start, length), two));
    start += length;
  }
  EXPECT_TRUE(torch::cat(ones, 1).equal(alone(x_)));
  EXPECT_TRUE(torch::cat(twos, 1).equal(alone(other)));
}

void PrintTo(const Case& test_case, std::ostream* out) { *out << test_case.name; }

INSTANTIATE_TEST_SUITE_P(Layers, Streaming, testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

TEST(StreamingTransformer, LogitsOfEveryKindOfModel) {
  const torch::NoGradGuard no_grad;
  std::mt19937 random(3);
  for (const auto& options :
       {TransformerOptions{.num_tokens = 17, .dim = kDim, .depth = 2},
        TransformerOptions{.num_tokens = 17, .dim = kDim, .depth = 2, .post_ln_norm = true},
        TransformerOptions{.num_tokens = 17, .dim = kDim, .depth = 2, .gate_loop_heads = 6},
        TransformerOptions{.num_tokens = 17,
        .dim = kDim,
        .depth = 2,
        .dim_head = 4,
        .heads = 3,
        .use_gate_looped_attn = false,
        .rotary_emb = true}}) {
    Transformer model(options);
    model->to(torch::kDouble);
    const auto ids = torch::randint(17, {kBatch, kTime}, torch::kLong);
    for (const auto& lengths : {std::vector<std::int64_t>(kTime, 1), random_cuts(kTime, random)}) {
      TransformerState state;
      const auto logits =
          stream(ids, lengths, [&](const Tensor& part) { return model->forward(part, &state); });
      expect_close(logits, model->forward(ids), kTolerance);
    }
  }
}

TEST(StreamingSimpleGateLoopLayer, CacheContinues) {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  std::mt19937 random(3);
  for (const auto& options : {SimpleGateLoopLayerOptions{},
                              SimpleGateLoopLayerOptions{.prenorm = false, .post_ln = true}}) {
    SimpleGateLoopLayer layer(kDim, options);
    layer->to(torch::kDouble);
    const auto x = torch::randn({kBatch, kTime, kDim}, torch::kDouble);
    const auto whole = layer->forward_with_cache(x).second;
    for (const auto& lengths : {std::vector<std::int64_t>(kTime, 1), random_cuts(kTime, random)}) {
      SimpleGateLoopCache cache;
      const auto y = stream(x, lengths, [&](const Tensor& part) {
        auto [out, next] = layer->forward_with_cache(part, cache);
        cache = next;
        return out;
      });
      expect_close(y, layer->forward(x), kTolerance);
      expect_close(cache.a, whole.a, kTolerance);
      expect_close(cache.kv, whole.kv, kTolerance);
    }
  }
}

TEST(StreamingSimpleGateLoopLayer, ReverseIsTheFlippedSequence) {
  const torch::NoGradGuard no_grad;
  SimpleGateLoopLayer forward(kDim), backward(kDim, SimpleGateLoopLayerOptions{.reverse = true});
  backward->parameters()[0].copy_(forward->parameters()[0]);
  backward->parameters()[1].copy_(forward->parameters()[1]);
  const auto x = torch::randn({kBatch, kTime, kDim});
  // float32, the same sums in the same order.
  expect_close(backward->forward(x), forward->forward(x.flip(1)).flip(1), 1e-6);
}

// torch's layers have public members: what is assigned there is what the model computes with.
TEST(StreamingTransformer, ReadsTheWeightsThatItsLayersHold) {
  const torch::NoGradGuard no_grad;
  Transformer model(TransformerOptions{.num_tokens = 17, .dim = kDim, .depth = 2});
  const auto ids = torch::randint(17, {1, 1}, torch::kLong);
  const auto before = model->forward(ids);
  auto* layer = model->named_modules("", false)["layers.1.1.fn.2"]->as<torch::nn::Linear>();
  layer->weight = 2 * layer->weight;  // as merging an adapter does
  TransformerState state;
  const auto logits = model->forward(ids, &state);
  EXPECT_TRUE(logits.equal(model->forward(ids)));
  EXPECT_GT(channel_error(logits, before), 0.01);
}

TEST(SimpleGateLoopLayer, InferenceIsTheForwardPassOfTraining) {
  SimpleGateLoopLayer layer(kDim);
  const auto x = torch::randn({1, 5000, kDim});
  const auto training = layer->forward(x);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(layer->forward(x).equal(training));
}

CausalFullAttention one_head(AttentionOptions options = {}) {
  options.dim = kDim, options.dim_head = 4, options.heads = 1;
  return CausalFullAttention(options);
}

// Growth by doubling: a thousand steps reallocate the cache ten times, not a thousand.
TEST(KeyValueCache, GrowsByDoubling) {
  const torch::NoGradGuard no_grad;
  auto layer = one_head();
  MixerState state;
  int allocations = 0;
  std::int64_t capacity = 0;
  for (int t = 0; t < 1000; ++t) {
    layer->forward(torch::randn({1, 1, kDim}), {}, &state);
    if (state.keys.size(2) != capacity) ++allocations, capacity = state.keys.size(2);
  }
  EXPECT_EQ(allocations, 11);  // 1, 2, 4, ..., 1024
}

TEST(KeyValueCache, ACopiedStateCostsOneCopy) {
  const torch::NoGradGuard no_grad;
  auto layer = one_head();
  const auto step = [&](MixerState& state) {
    layer->forward(torch::randn({1, 1, kDim}), {}, &state);
    return state.keys.const_data_ptr();
  };
  MixerState state;
  for (int t = 0; t < 5; ++t) step(state);  // a capacity of 8
  const auto* const before = state.keys.const_data_ptr();
  MixerState copy = state;
  const auto* const copied = step(copy);
  EXPECT_NE(copied, before);
  EXPECT_EQ(step(copy), copied);
  EXPECT_EQ(step(state), before);  // the only owner again
}

// The values of an earlier step belong to its graph where they take part in a gradient.
TEST(KeyValueCache, LeavesTheGraphOfAnEarlierStepAlone) {
  auto layer = one_head({.data_dependent_rel_pos = true});
  layer->named_parameters()["to_qkv.0.weight"].set_requires_grad(false);
  MixerState state;
  std::vector<Tensor> outputs;
  for (int t = 0; t < 4; ++t)
    outputs.push_back(layer->forward(torch::randn({1, 1, kDim}), {}, &state));
  EXPECT_NO_THROW(torch::stack(outputs).sum().backward());
}

TEST(KeyValueCache, KeepsTheWiderDtype) {
  for (const auto& [first, second] :
       {std::pair{torch::kBFloat16, torch::kFloat}, std::pair{torch::kFloat, torch::kBFloat16}}) {
    const auto fresh = torch::randn({1, 1, 4, 2});
    Tensor cache;
    gateloop::nn::append(cache, 0, fresh.to(first));
    const auto all = gateloop::nn::append(cache, 4, fresh.to(second));
    EXPECT_EQ(all.scalar_type(), second);
    EXPECT_TRUE(cache.narrow(2, 0, 4).equal(fresh.to(first).to(torch::kFloat)));
    EXPECT_TRUE(cache.narrow(2, 4, 4).equal(fresh.to(second).to(torch::kFloat)));
  }
}

// States outlive the mode that they were made in.
TEST(KeyValueCache, ContinuesAfterInferenceMode) {
  auto layer = one_head();
  MixerState state;
  {
    const c10::InferenceMode inference;
    layer->forward(torch::randn({1, 3, kDim}), {}, &state);
  }
  const torch::NoGradGuard no_grad;
  EXPECT_NO_THROW(layer->forward(torch::randn({1, 1, kDim}), {}, &state));
}

}  // namespace streaming_test
