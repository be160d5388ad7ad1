// Errors name the function, the argument, what was expected and what came.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>

#include "gateloop/nn.h"

namespace errors_test {

using namespace gateloop::nn;

template <typename Call>
void expect_error(const std::string& message, Call call) {
  try {
    call();
    FAIL() << "no error; expected: " << message;
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(message), std::string::npos)
        << error.what_without_backtrace();
  }
}

Transformer small() {
  return Transformer(TransformerOptions{.num_tokens = 10, .dim = 8, .depth = 1});
}

TEST(Errors, Ids) {
  auto model = small();
  expect_error("Transformer: ids must be (B, T) int64, got Int of shape [2, 3]", [&] {
    model->forward(torch::zeros({2, 3}, torch::kInt));
  });
  expect_error("Transformer: ids must be (B, T) int64, got Long of shape [3]",
               [&] { model->forward(torch::zeros({3}, torch::kLong)); });
  expect_error("Transformer: ids must be in [0, 10), got 10", [&] {
    model->forward(torch::full({1, 2}, 10, torch::kLong));
  });
  expect_error("Transformer: ids must be in [0, 10), got -1", [&] {
    model->forward(torch::full({1, 2}, -1, torch::kLong));
  });
  expect_error("Transformer: loss needs ids of shape (B, T + 1) with T >= 1, got [2, 1]", [&] {
    model->loss(torch::zeros({2, 1}, torch::kLong));
  });
}

TEST(Errors, State) {
  auto model = small();
  TransformerState state(3);
  expect_error("Transformer: state must have one entry for each of 1 layers, got 3", [&] {
    model->forward(torch::zeros({1, 1}, torch::kLong), &state);
  });

  CausalFullAttention attention(CausalFullAttentionOptions{.dim = 8, .dim_head = 4, .heads = 2});
  MixerState carried;
  attention->forward(torch::randn({1, 3, 8}), {}, &carried);
  expect_error("CausalFullAttention: state holds keys of shape [1, 2, 3, 4] at position 3", [&] {
    attention->forward(torch::randn({2, 1, 8}), {}, &carried);
  });
  MixerState elsewhere{.position = 5};
  expect_error("CausalFullAttention: state is at position 5 but holds no keys", [&] {
    attention->forward(torch::randn({2, 1, 8}), {}, &elsewhere);
  });

  GateLoopedAttention gate_loop(GateLoopedAttentionOptions{.dim = 8});
  MixerState recurrent;
  gate_loop->forward(torch::randn({1, 3, 8}), {}, &recurrent);
  expect_error("initial_state", [&] {
    gate_loop->forward(torch::randn({2, 1, 8}), {}, &recurrent);
  });
}

TEST(Errors, Sequences) {
  GateLoopedAttention gate_loop(GateLoopedAttentionOptions{.dim = 8});
  expect_error(
      "GateLoopedAttention: x must be (B, T, 8) and floating point, got Float of shape [2, 3, 7]",
      [&] {
        gate_loop->forward(torch::zeros({2, 3, 7}));
      });
  SimpleGateLoopLayer layer(8);
  expect_error("SimpleGateLoopLayer: x must be (B, T, 8) and floating point, got Long", [&] {
    layer->forward(torch::zeros({2, 3, 8}, torch::kLong));
  });
}

TEST(Errors, Options) {
  expect_error("GateLoopedAttention: heads must divide dim_inner, got 3 heads for dim_inner 8",
               [] { GateLoopedAttention(GateLoopedAttentionOptions{.dim = 8, .heads = 3}); });
  expect_error(
      "GateLoopedAttention: transition_bias needs the sigmoid or magnitude_phase gate", [] {
        Transformer(TransformerOptions{.dim = 8, .depth = 1, .transition_bias = {{0.0, 1.0}}});
      });
  expect_error("GateLoopedAttention: phase_bias needs the magnitude_phase gate, got polar", [] {
    Transformer(TransformerOptions{.dim = 8, .depth = 1, .phase_bias = {{0.0, 1.0}}});
  });
  expect_error("GateLoopedAttention: heads must divide dim_key, got 4 heads for dim_key 6", [] {
    GateLoopedAttention(GateLoopedAttentionOptions{.dim = 8, .heads = 4, .dim_key = 6});
  });
  expect_error("GateLoopedAttention: per_key_transitions must be false with the feature map", [] {
    GateLoopedAttention(GateLoopedAttentionOptions{
        .dim = 8, .heads = 4, .per_key_transitions = true, .feature_map = FeatureMap::kTaylor});
  });
  expect_error("CausalFullAttention: dim_head must be even with rotary_emb, got 5", [] {
    CausalFullAttention(CausalFullAttentionOptions{.dim = 8, .dim_head = 5, .rotary_emb = true});
  });
  expect_error("Transformer: dim must be positive, got 0",
               [] { Transformer(TransformerOptions{.dim = 0}); });
  expect_error("FeedForward: mult must be positive, got -1", [] { FeedForward(8, -1); });
}

TEST(Errors, SimpleGateLoopCache) {
  SimpleGateLoopLayer reversed(8, SimpleGateLoopLayerOptions{.reverse = true});
  expect_error("SimpleGateLoopLayer: a reversed layer has no cache", [&] {
    reversed->forward_with_cache(torch::randn({1, 2, 8}));
  });
  SimpleGateLoopLayer layer(8);
  const auto cache = layer->forward_with_cache(torch::randn({1, 2, 8})).second;
  expect_error("SimpleGateLoopLayer: cache.a must be (B * dim, 1) = (16, 1), got [8, 1]", [&] {
    layer->forward_with_cache(torch::randn({2, 2, 8}), cache);
  });
  expect_error("SimpleGateLoopLayer: cache.kv must be (B * dim, 1) = (8, 1), got nothing", [&] {
    layer->forward_with_cache(torch::randn({1, 2, 8}), {.a = cache.a, .kv = {}});
  });
}

}  // namespace errors_test
