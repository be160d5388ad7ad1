// Positions are integers and angles float32 or wider, whatever the model's dtype.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "compare.h"
#include "gateloop/nn.h"
#include "nn/rotary_embedding.h"

namespace rotary_test {

using namespace gateloop::nn;

constexpr std::int64_t kFirst = 250, kTime = 800, kHead = 16;  // bfloat16 has no 257

TEST(RotaryEmbedding, LowPrecisionRoundsTheResultOnly) {
  torch::manual_seed(1);
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    RotaryEmbedding exact(kHead), low(kHead);
    low.to(dtype);
    low.to(torch::kCPU, dtype);
    const auto t = torch::randn({1, kTime, 2, kHead}).to(dtype);
    const auto expected = RotaryEmbedding::rotate(t.to(torch::kFloat), exact.angles(kFirst, kTime));
    const auto got = RotaryEmbedding::rotate(t, low.angles(kFirst, kTime));
    EXPECT_EQ(got.scalar_type(), dtype);
    EXPECT_TRUE(got.equal(expected.to(dtype)));
  }
}

TEST(RotaryEmbedding, AnglesOfAFloat64ModelAreFloat64) {
  RotaryEmbedding rotary(kHead);
  rotary.to(torch::kDouble);
  EXPECT_EQ(rotary.angles(0, 3).cos.scalar_type(), torch::kDouble);
}

TEST(RotaryEmbedding, BFloat16AttentionIsThatOfFloat32) {
  torch::manual_seed(1);
  const torch::NoGradGuard no_grad;
  const auto layer = [&](torch::Dtype dtype) {
    torch::manual_seed(2);
    CausalFullAttention made(
        CausalFullAttentionOptions{.dim = 32, .dim_head = kHead, .heads = 2, .rotary_emb = true});
    for (auto& p : made->parameters()) {
      if (p.dim() == 2) p.mul_(3).copy_(p.to(torch::kBFloat16));  // the same weights in both
    }
    made->to(dtype);
    return made;
  };
  const auto x = torch::randn({1, 600, 32}).to(torch::kBFloat16);
  const auto expected = layer(torch::kFloat)->forward(x.to(torch::kFloat));
  const auto got = layer(torch::kBFloat16)->forward(x);
  // A rounding of 2^-9 in q, k, v, the weights of the softmax and the output; scores of a few units
  // double those of q and k. √10 · 2^-9 = 0.6 % of a number. The largest of 11,000 such errors is
  // four deviations, 2.5 %, and of each channel half as much again where its numbers are small.
  expect_close(got.narrow(1, 257, 343), expected.narrow(1, 257, 343), 0.04);
}

}  // namespace rotary_test
