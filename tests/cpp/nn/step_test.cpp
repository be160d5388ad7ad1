// Decoding one sequence: which models are one operator, with which of their parameters.
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "nn/step_weights.h"

namespace {

using namespace gateloop::nn;
namespace ops = gateloop::ops;
using torch::Tensor;

TransformerOptions small() { return {.num_tokens = 11, .dim = 12, .depth = 2, .ff_mult = 2}; }

std::vector<TransformerOptions> stepped() {
  std::vector<TransformerOptions> all(6, small());
  all[1].post_ln_norm = true;
  all[2].sub_ln = true;
  all[3].attn_add_swish_gating = false;
  all[4].gate = Gate::kSigmoid;
  all[4].normalize_input = true;
  all[5].dim_gate_looped_attn = all[5].gate_loop_heads = 20;
  return all;
}

TEST(Step, HasEveryParameterOnce) {
  for (const TransformerOptions& options : stepped()) {
    const Transformer model(options);
    const auto weights = step_weights(options, *model);
    ASSERT_TRUE(weights);
    std::multiset<const at::TensorImpl*> found, expected;
    const auto note = [&](const Tensor& t) {
      if (t.defined()) found.insert(t.unsafeGetTensorImpl());
    };
    note(weights->embedding), note(weights->final_norm), note(weights->to_logits);
    for (const auto& layer : weights->layers) {
      for (const auto weight : ops::kLayerWeights) note(layer.*weight);
    }
    for (const Tensor& p : model->parameters()) expected.insert(p.unsafeGetTensorImpl());
    EXPECT_EQ(found, expected);
  }
}

TEST(Step, IsTakenForOneTokenThatNothingDifferentiates) {
  const Tensor one = torch::zeros({1, 1}, torch::kLong), two = torch::zeros({2, 1}, torch::kLong);
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16}) {
    const TransformerOptions options = small();
    Transformer model(options);
    const auto weights = step_weights(options, *model);
    model->to(dtype);  // the weights follow
    EXPECT_FALSE(ops::is_transformer_step(one, *weights));
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(ops::is_transformer_step(one, *weights));
    EXPECT_FALSE(ops::is_transformer_step(two, *weights));
    EXPECT_FALSE(ops::is_transformer_step(two.t(), *weights));
    EXPECT_EQ(std::get<0>(ops::transformer_step(one, *weights, {})).scalar_type(), dtype);
  }
}

TEST(Step, IsTheForwardPass) {
  for (const TransformerOptions& options : stepped()) {
    Transformer model(options);
    model->to(torch::kFloat64);
    const torch::NoGradGuard no_grad;
    const Tensor ids = torch::randint(11, {1, 1}, torch::kLong);
    const auto [logits, states] = ops::transformer_step(ids, *step_weights(options, *model), {});
    EXPECT_TRUE(torch::allclose(logits, model->forward(ids), 1e-11, 1e-11));
    EXPECT_EQ(states.size(), 2U);
  }
}

TEST(Step, DoesNotKnowOtherModels) {
  TransformerOptions wide = small(), attention = small();
  wide.gate_loop_heads = 4;
  attention.use_gate_looped_attn = false;
  for (const TransformerOptions& options : {wide, attention}) {
    EXPECT_FALSE(step_weights(options, *Transformer(options)));
  }
}

TEST(Step, RefusesAStateOfAnotherModel) {
  const TransformerOptions options = small();
  const Transformer model(options);
  const torch::NoGradGuard no_grad;
  const Tensor ids = torch::zeros({1, 1}, torch::kLong);
  const auto weights = step_weights(options, *model);
  for (const Tensor& state : {torch::zeros({1, 13}, torch::kComplexFloat), torch::zeros({1, 12}),
                              torch::zeros({2, 12}, torch::kComplexFloat)}) {
    EXPECT_THROW(ops::transformer_step(ids, *weights, {state}), c10::Error);
  }
}

}  // namespace
