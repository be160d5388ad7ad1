// Layers that run again in the backward pass: the same as with everything kept.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "compare.h"
#include "gateloop/nn.h"
#include "nn/autocast.h"

namespace checkpoint_blocks_test {

using namespace gateloop::nn;
using torch::Tensor;

constexpr std::int64_t kTokens = 11;

TransformerOptions options(const std::string& layers = "gate_loop") {
  TransformerOptions o;
  o.dim = 16;
  o.num_tokens = kTokens;
  o.depth = 3;
  o.heads = 2;
  o.dim_head = 8;
  o.layer_pattern = layers;
  return o;
}

std::vector<std::pair<std::string, TransformerOptions>> covering_options() {
  std::vector<std::pair<std::string, TransformerOptions>> all;
  const auto add = [&](const char* name, const char* layers, auto change) {
    all.emplace_back(name, options(layers));
    change(all.back().second);
  };
  add("gate_loop", "gate_loop", [](auto&) {});
  add("every mixer", "gate_loop,attention,none", [](auto& o) { o.rotary_emb = true; });
  add("post-norm", "gate_loop,attention", [](auto& o) { o.post_ln_norm = true; });
  add("simple gate loop", "gate_loop",
      [](auto& o) { o.simple_gate_loop = gateloop::model::SimpleGateLoopSpec{}; });
  add("wide heads", "gate_loop", [](auto& o) { o.gate_loop_heads = 2; });
  add("tied", "gate_loop", [](auto& o) { o.tie_embeddings = true; });
  return all;
}

struct Pass {
  Tensor loss;
  std::vector<Tensor> gradients;
};

Pass pass(Transformer model, const Tensor& ids, bool checkpoint_blocks,
          torch::ScalarType autocast = torch::kFloat, const Packing& packing = {}) {
  model->set_checkpoint_blocks(checkpoint_blocks);
  model->zero_grad();
  Pass result;
  {
    const Autocast in_autocast(torch::kCPU, autocast);
    result.loss = model->loss(ids, std::nullopt, packing);
  }
  result.loss.backward();
  for (const Tensor& parameter : model->parameters()) {
    result.gradients.push_back(parameter.grad().defined() ? parameter.grad().clone() : Tensor());
  }
  return result;
}

/// To the last bit.
void expect_equal(const Pass& found, const Pass& expected) {
  EXPECT_TRUE(torch::equal(found.loss, expected.loss));
  ASSERT_EQ(found.gradients.size(), expected.gradients.size());
  for (std::size_t i = 0; i < found.gradients.size(); ++i) {
    ASSERT_EQ(found.gradients[i].defined(), expected.gradients[i].defined()) << i;
    if (expected.gradients[i].defined()) {
      EXPECT_TRUE(torch::equal(found.gradients[i], expected.gradients[i]))
          << i << ": off by " << channel_error(found.gradients[i], expected.gradients[i]);
    }
  }
}

Transformer make(const TransformerOptions& o) {
  torch::manual_seed(0);
  return Transformer(o);
}

TEST(CheckpointBlocks, GiveTheSameBits) {
  const Tensor ids = torch::randint(kTokens, {2, 40});
  for (const auto& [name, o] : covering_options()) {
    SCOPED_TRACE(name);
    Transformer model = make(o);
    for (const auto autocast : {torch::kFloat, torch::kBFloat16}) {
      SCOPED_TRACE(torch::toString(autocast));
      expect_equal(pass(model, ids, true, autocast), pass(model, ids, false, autocast));
    }
  }
}

TEST(CheckpointBlocks, TakePackedSequences) {
  const Tensor ids = torch::randint(kTokens, {1, 23});
  const Packing packing{.cu_seqlens = torch::tensor({0, 1, 9, 14, 14, 23})};
  Transformer model = make(options());
  expect_equal(pass(model, ids, true, torch::kFloat, packing),
               pass(model, ids, false, torch::kFloat, packing));
}

TEST(CheckpointBlocks, LeaveFrozenParametersAlone) {
  const Tensor ids = torch::randint(kTokens, {2, 12});
  Transformer model = make(options());
  // Nothing that the first layer reads takes part in a gradient then.
  model->named_parameters()["token_emb.weight"].set_requires_grad(false);
  model->named_parameters()["layers.1.1.fn.0.weight"].set_requires_grad(false);
  const Pass found = pass(model, ids, true);
  EXPECT_FALSE(found.gradients[0].defined());
  expect_equal(found, pass(model, ids, false));
}

TEST(CheckpointBlocks, KeepWhatTheyReadAlone) {
  Transformer model = make(options());
  model->set_checkpoint_blocks(true);
  const Tensor logits = model->forward(torch::randint(kTokens, {1, 8}));
  // The graph from the logits to the embedding: one node a layer.
  std::vector<std::string> names;
  for (auto node = logits.grad_fn(); node;
       node = node->next_edges().empty() ? nullptr : node->next_edge(0).function) {
    names.push_back(node->name());
  }
  const auto layers = std::count_if(names.begin(), names.end(), [](const std::string& name) {
    return name.find("RecomputedBackward") != std::string::npos;
  });
  EXPECT_EQ(layers, 3);
}

TEST(CheckpointBlocks, RunHooksOfParametersOnce) {
  Transformer model = make(options());
  model->set_checkpoint_blocks(true);
  int calls = 0;
  const Tensor parameter = model->named_parameters()["layers.1.1.fn.0.weight"];
  parameter.register_hook([&](const Tensor&) { ++calls; });
  model->loss(torch::randint(kTokens, {2, 12})).backward();
  EXPECT_EQ(calls, 1);
}

TEST(CheckpointBlocks, ThrowWhereBackwardAloneHasTheGradients) {
  Transformer model = make(options());
  model->set_checkpoint_blocks(true);
  const auto message = [&](const auto& differentiate) -> std::string {
    try {
      differentiate(model->loss(torch::randint(kTokens, {2, 12})));
    } catch (const c10::NotImplementedError& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  EXPECT_EQ(message([](const Tensor& loss) {
              loss.backward({}, /*retain_graph=*/true, /*create_graph=*/true);
            }),
            "Transformer: checkpoint_blocks has no second derivatives");
  EXPECT_EQ(
      message([&](const Tensor& loss) { torch::autograd::grad({loss}, {model->parameters()[0]}); }),
      "Transformer: checkpoint_blocks needs backward() without inputs, got autograd::grad()");
}

}  // namespace checkpoint_blocks_test
