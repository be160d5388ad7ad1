// Threads that take rows of their own: the gradient of one model that takes all.
#include "training/replicas.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <stdexcept>
#include <vector>

#include "models.h"

namespace gateloop::training {
namespace {

using torch::Tensor;

constexpr std::int64_t kRows = 6;

class ReplicasTest : public ::testing::Test {
 protected:
  ~ReplicasTest() override { torch::set_num_threads(1); }

  Replicas replicas(int count) {
    torch::set_num_threads(count);
    return {model_, count};
  }

  /// The sum over rows of their losses, by `n` parts at a time; leaves its gradient in the model.
  void backward(Replicas& replicas, std::int64_t n) const {
    const std::vector<Tensor> parts = ids_.chunk(n);
    replicas.for_each(n, [&](nn::Transformer& model, std::int64_t i) {
      const Tensor& part = parts[static_cast<std::size_t>(i)];
      (model->loss(part) * part.size(0)).backward();
    });
    replicas.gather_gradients();
  }

  /// Of the model, which has none afterwards.
  std::vector<Tensor> take_gradients() {
    std::vector<Tensor> found;
    for (const Tensor& weight : model_->parameters()) {
      found.push_back(weight.grad().defined() ? weight.grad().clone() : Tensor());
    }
    model_->zero_grad();
    return found;
  }

  static void expect_close(const std::vector<Tensor>& found, const std::vector<Tensor>& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      ASSERT_EQ(found[i].defined(), expected[i].defined()) << i;
      if (!found[i].defined()) continue;
      const double scale = expected[i].abs().max().item<double>();
      EXPECT_GT(scale, 0) << i;
      EXPECT_LT((found[i] - expected[i]).abs().max().item<double>(), 1e-12 * scale) << i;
    }
  }

  nn::Transformer model_ = test::make_model(test::small_options(), 1);
  const Tensor ids_ = torch::randint(256, {kRows, 25}, torch::kLong);
};

TEST_F(ReplicasTest, GradientsAreThoseOfTheWhole) {
  Replicas one = replicas(1), three = replicas(3);
  EXPECT_EQ(one.count(), 1);
  EXPECT_EQ(three.count(), 3);
  backward(one, 1);
  const auto expected = take_gradients();
  for (const std::int64_t n : {3, 2, 1}) {
    backward(three, n);
    expect_close(take_gradients(), expected);
  }
  // In rounds, and with gradients that are there already.
  backward(three, 3);
  backward(three, 2);
  auto twice = expected;
  for (Tensor& gradient : twice) {
    if (gradient.defined()) gradient = 2 * gradient;
  }
  expect_close(take_gradients(), twice);
}

TEST_F(ReplicasTest, SumsHaveTheSameBitsInEveryRun) {
  Replicas three = replicas(3);
  backward(three, 3);
  const auto first = take_gradients();
  for (int run = 0; run < 20; ++run) {
    backward(three, 3);
    const auto again = take_gradients();
    for (std::size_t i = 0; i < first.size(); ++i) {
      EXPECT_TRUE(!first[i].defined() || torch::equal(again[i], first[i])) << run << ' ' << i;
    }
  }
}

TEST_F(ReplicasTest, CopiesFollowTheWeightsAndWhichOfThemAreTrained) {
  model_->named_parameters()["token_emb.weight"].requires_grad_(false);
  Replicas one = replicas(1), three = replicas(3);
  {
    const torch::NoGradGuard no_grad;
    for (Tensor& weight : model_->parameters()) weight.mul_(1.5);
  }
  backward(one, 1);
  const auto expected = take_gradients();
  backward(three, 3);
  expect_close(take_gradients(), expected);
  EXPECT_FALSE(model_->named_parameters()["token_emb.weight"].grad().defined());
}

TEST_F(ReplicasTest, AnErrorInOneIsThrown) {
  Replicas three = replicas(3);
  const auto fail_in_one = [](nn::Transformer&, std::int64_t i) {
    if (i == 1) throw std::runtime_error("in one");
  };
  try {
    three.for_each(3, fail_in_one);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "in one");
  }
}

}  // namespace
}  // namespace gateloop::training
