// Recomputing the states of wide heads gives the derivatives of keeping them.
#include "nn/wide_heads.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>
#include <vector>

#include "compare.h"

namespace {

using torch::Tensor;
using torch::autograd::variable_list;

constexpr double kTolerance = 1e-12;  // float64, sums in another order

struct Inputs {
  explicit Inputs(torch::Dtype transition) {
    torch::manual_seed(3);
    const auto real = torch::kDouble;
    const auto sequence = [&] { return torch::randn({2, 7, 3, 4}, real).requires_grad_(); };
    const Tensor q = sequence(), k = sequence(), v = sequence();
    const Tensor a = (0.5 * torch::randn({2, 7, 3}, transition)).requires_grad_();
    all = {q, k, v, a, torch::randn({2, 3, 4, 4}, transition).requires_grad_()};
    dy = torch::randn({2, 7, 3, 4}, real).requires_grad_();
  }
  Tensor read(bool recompute) const {
    return gateloop::nn::wide_heads_read(all[0], all[1], all[2], all[3], all[4], recompute).first;
  }
  variable_list gradients(bool recompute, bool create_graph) const {
    return torch::autograd::grad({read(recompute)}, all, {dy}, create_graph, create_graph);
  }
  variable_list all;  // q, k, v, a, initial_state
  Tensor dy;
};

void expect_same(const variable_list& got, const variable_list& expected) {
  const std::vector<std::string> names = {"q", "k", "v", "a", "initial_state", "dy"};
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    SCOPED_TRACE(names[i]);
    ASSERT_TRUE(got[i].defined());
    EXPECT_GT(expected[i].abs().max().item<double>(), 0);
    expect_close(got[i], expected[i], kTolerance);
  }
}

class WideHeads : public testing::TestWithParam<torch::Dtype> {};

TEST_P(WideHeads, FirstDerivatives) {
  const Inputs in(GetParam());
  expect_same(in.gradients(true, false), in.gradients(false, false));
}

TEST_P(WideHeads, SecondDerivatives) {
  const Inputs in(GetParam());
  const auto second = [&](bool recompute) {
    const auto first = in.gradients(recompute, true);
    Tensor sum = torch::zeros({}, torch::kDouble);
    for (std::size_t i = 0; i < first.size(); ++i) {
      const auto g = first[i].is_complex() ? torch::view_as_real(first[i]) : first[i];
      sum = sum + g.square().sum();
    }
    auto inputs = in.all;
    inputs.push_back(in.dy);
    return torch::autograd::grad({sum}, inputs);
  };
  expect_same(second(true), second(false));
}

TEST_P(WideHeads, GradientsOfSomeInputsOnly) {
  Inputs in(GetParam());
  const auto expected = in.gradients(false, false);
  for (const std::size_t i : {0, 2, 4}) in.all[i].set_requires_grad(false);
  const auto got = torch::autograd::grad({in.read(true)}, {in.all[1], in.all[3]}, {in.dy});
  expect_close(got[0], expected[1], kTolerance);
  expect_close(got[1], expected[3], kTolerance);
}

INSTANTIATE_TEST_SUITE_P(Transitions, WideHeads,
                         testing::Values(torch::kDouble, torch::kComplexDouble),
                         [](const auto& info) { return c10::toString(info.param); });

}  // namespace
