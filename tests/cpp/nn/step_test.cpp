// One token through a whole model as one operator: for which models, with which of their tensors.
#include <gtest/gtest.h>

#include <vector>

#include "compare.h"
#include "nn/decoding_step.h"

namespace {

using namespace gateloop::nn;
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

DecodingStep step_of(const Transformer& model) { return {model->spec(), LayerTensors(*model)}; }

TEST(Step, TakesOneTokenThatNothingDifferentiates) {
  const Tensor one = torch::zeros({1, 1}, torch::kLong), two = torch::zeros({2, 1}, torch::kLong);
  for (const auto dtype : {torch::kFloat32, torch::kFloat64, torch::kBFloat16}) {
    Transformer model(small());
    model->to(dtype);
    const auto step = step_of(model);
    EXPECT_FALSE(step.takes(one));
    const torch::NoGradGuard no_grad;
    EXPECT_TRUE(step.takes(one));
    EXPECT_FALSE(step.takes(two));
    EXPECT_FALSE(step.takes(two.t()));
    TransformerState state;
    EXPECT_EQ(step(one, state).scalar_type(), dtype);
  }
}

TEST(Step, IsTheForwardPass) {
  torch::manual_seed(1);
  const torch::NoGradGuard no_grad;
  for (const TransformerOptions& options : stepped()) {
    Transformer model(options);
    // Norms start as ones and zeros, which would hide a parameter that is left out.
    for (Tensor& p : model->parameters()) p.add_(0.2 * torch::randn_like(p));
    model->to(torch::kFloat64);
    const auto step = step_of(model);
    TransformerState state;
    const Tensor ids = torch::randint(11, {1, 3}, torch::kLong), logits = model->forward(ids);
    for (std::int64_t t = 0; t < 3; ++t) {
      // Float64, sums in another order.
      expect_close(step(ids.narrow(1, t, 1), state), logits.narrow(1, t, 1), 1e-11);
    }
    EXPECT_EQ(state.at(1).position, 3);
  }
}

TEST(Step, TakesNoOtherModels) {
  std::vector<TransformerOptions> others(4, small());
  others[0].gate_loop_heads = 4;
  others[1].use_gate_looped_attn = false;
  others[2].ablate_complex = true;
  others[3].ablate_state_transition = true;
  const torch::NoGradGuard no_grad;
  for (const TransformerOptions& options : others) {
    const Transformer model(options);
    EXPECT_FALSE(step_of(model).takes(torch::zeros({1, 1}, torch::kLong)));
  }
}

TEST(Step, RefusesAStateOfAnotherModel) {
  const Transformer model(small());
  const torch::NoGradGuard no_grad;
  const auto step = step_of(model);
  for (const Tensor& wrong : {torch::zeros({1, 13}, torch::kComplexFloat), torch::zeros({1, 12}),
                              torch::zeros({2, 12}, torch::kComplexFloat)}) {
    TransformerState state(2);
    state[1].recurrence = wrong;
    EXPECT_THROW(step(torch::zeros({1, 1}, torch::kLong), state), c10::Error);
  }
}

TEST(Step, RefusesIdsOutsideOfTheVocabulary) {
  const Transformer model(small());
  const torch::NoGradGuard no_grad;
  const auto step = step_of(model);
  TransformerState state;
  for (const std::int64_t id : {-1, 11})
    EXPECT_THROW(step(torch::full({1, 1}, id, torch::kLong), state), c10::Error);
}

}  // namespace
