// What a fresh model starts from. That one seed gives the peer's very weights is in
// golden_test.cpp.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>

#include "gateloop/nn.h"

namespace initial_values_test {

using namespace gateloop::nn;

/// Uniform over [-1/√fan_in, 1/√fan_in], torch's default for a Linear.
void expect_linear_default(const torch::Tensor& values, std::int64_t fan_in) {
  const auto bound = 1 / std::sqrt(static_cast<double>(fan_in));
  const auto wide = values.detach().to(torch::kDouble);
  EXPECT_LE(wide.abs().max().item<double>(), bound * (1 + 1e-6));
  if (values.numel() < 1000) return;
  // Five standard errors of the mean and of the standard deviation over n values.
  const auto slack = 5 / std::sqrt(static_cast<double>(values.numel()));
  EXPECT_NEAR(wide.mean().item<double>() / bound, 0, slack);
  EXPECT_NEAR(wide.std().item<double>() / bound, 1 / std::sqrt(3.0), slack);
}

TEST(InitialValues, FollowTorchsDefaults) {
  torch::manual_seed(0);
  Transformer model(TransformerOptions{.num_tokens = 100, .dim = 64, .depth = 1, .sub_ln = true});
  for (const auto& item : model->named_parameters()) {
    SCOPED_TRACE(item.key());
    const auto& name = item.key();
    const auto& value = item.value();
    if (name == "token_emb.weight") {
      EXPECT_NEAR(value.mean().item<double>(), 0, 5 / std::sqrt(6400.0));
      EXPECT_NEAR(value.std().item<double>(), 1, 5 / std::sqrt(6400.0));
    } else if (name.ends_with("gamma") || name.ends_with("ln.weight")) {
      EXPECT_TRUE(value.eq(1).all().item<bool>());
    } else if (name.ends_with("ln.bias")) {
      EXPECT_TRUE(value.eq(0).all().item<bool>());
    } else {
      expect_linear_default(value, name.find(".fn.2.") == std::string::npos ? 64 : 256);
    }
  }
}

TEST(InitialValues, TransitionBiasIsSpreadOverHeads) {
  GateLoopedAttention layer(GateLoopedAttentionOptions{
      .dim = 16, .heads = 4, .gate = Gate::kSigmoid, .transition_bias = {{-1.0, 5.0}}});
  const auto bias = layer->named_parameters()["to_a.0.bias"];
  EXPECT_TRUE(torch::allclose(bias, torch::tensor({-1.0F, 1.0F, 3.0F, 5.0F})));
}

// Magnitudes in order; phases a golden section of their range apart.
TEST(InitialValues, TransitionsOfTwoNumbersAreSpreadOverBoth) {
  GateLoopedAttention layer(GateLoopedAttentionOptions{.dim = 15,
                                                       .heads = 3,
                                                       .gate = Gate::kMagnitudePhase,
                                                       .transition_bias = {{-1.0, 5.0}},
                                                       .phase_bias = {{1.0, 3.0}}});
  const auto bias = layer->named_parameters()["to_a.0.bias"];
  EXPECT_TRUE(
      torch::allclose(bias, torch::tensor({-1.0F, 1.0F, 2.0F, 2.2360680F, 5.0F, 1.4721360F})));
}

TEST(InitialValues, RotaryFrequenciesAreNotTrained) {
  CausalFullAttention layer(
      CausalFullAttentionOptions{.dim = 16, .dim_head = 4, .heads = 2, .rotary_emb = true});
  const auto freqs = layer->named_parameters()["rotary_emb.freqs"];
  EXPECT_TRUE(torch::allclose(freqs, torch::tensor({1.0F, 0.01F})));
  EXPECT_FALSE(freqs.requires_grad());
}

TEST(RMSNorm, RowOfZerosGivesZeros) {
  RMSNorm norm(8);
  const auto x = torch::zeros({2, 8}).requires_grad_();
  const auto y = norm->forward(x);
  EXPECT_TRUE(y.eq(0).all().item<bool>());
  y.sum().backward();
  EXPECT_TRUE(x.grad().isfinite().all().item<bool>());
}

}  // namespace initial_values_test
