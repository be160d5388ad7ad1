// What blocks fuse, against the torch operators that it stands for: values, gradients, gradients of
// gradients, and the dtypes under autocast.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <vector>

#include "compare.h"
#include "ops/activations.h"
#include "ops/linear.h"
#include "ops/residual_norm.h"
#include "ops/rms_norm.h"

namespace fused_test {

using torch::Tensor;
using Tensors = std::vector<Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

// Sums of 40 numbers in another order.
constexpr double kFloat64 = 1e-13, kFloat32 = 1e-5;

Tensors leaves(const Tensors& tensors) {
  Tensors copies;
  for (const auto& t : tensors) copies.push_back(t.detach().clone().requires_grad_());
  return copies;
}

/// Results, gradients of their weighted sums, and gradients of a function of the gradients.
Tensors everything(const Function& function, const Tensors& arguments) {
  const auto in = leaves(arguments);
  auto all = function(in);
  Tensor total = torch::zeros({}, in[0].options());
  for (const auto& t : all)
    total = total + (t * torch::linspace(-1, 2, t.numel(), t.options()).view_as(t)).pow(2).sum();
  auto gradients = torch::autograd::grad({total}, in, {}, /*retain_graph=*/true);
  all.insert(all.end(), gradients.begin(), gradients.end());
  gradients = torch::autograd::grad({total}, in, {}, /*retain_graph=*/true, /*create_graph=*/true);
  Tensor again = torch::zeros({}, in[0].options());
  for (const auto& t : gradients) again = again + t.pow(2).sum();
  gradients = torch::autograd::grad({again}, in);
  all.insert(all.end(), gradients.begin(), gradients.end());
  return all;
}

void expect_equal(const Function& fused, const Function& pieces, const Tensors& arguments,
                  double tolerance) {
  const auto a = everything(fused, arguments), b = everything(pieces, arguments);
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(a[i].scalar_type(), b[i].scalar_type());
    b[i].dim() > 2 ? expect_close(a[i], b[i], tolerance)
                   : expect_weights_close(a[i], b[i], tolerance);
  }
}

/// (B, T, dim), rows apart in memory.
Tensor strided(std::int64_t dim, const torch::TensorOptions& options) {
  return torch::randn({2, 5, 2 * dim}, options).narrow(2, dim, dim);
}

class OfDtype : public ::testing::TestWithParam<torch::Dtype> {
 protected:
  OfDtype() { torch::manual_seed(11); }
  const torch::TensorOptions options_ = torch::dtype(GetParam());
  const double tolerance_ = GetParam() == torch::kDouble ? kFloat64 : kFloat32;
};
INSTANTIATE_TEST_SUITE_P(Fused, OfDtype, ::testing::Values(torch::kDouble, torch::kFloat));

TEST_P(OfDtype, RmsNormBehindAResidual) {
  const Tensors arguments = {strided(40, options_), strided(40, options_),
                             torch::randn({40}, options_)};
  expect_equal(
      [](const Tensors& in) -> Tensors {
        const auto n = gateloop::ops::add_then_rms_norm(in[0], in[1], in[2]);
        return {n.stream, n.input};
      },
      [](const Tensors& in) -> Tensors {
        const auto sum = in[0] + in[1];
        return {sum, gateloop::ops::rms_norm_composite(sum, in[2])};
      },
      arguments, tolerance_);
  expect_equal(
      [](const Tensors& in) -> Tensors {
        return {gateloop::ops::add_then_rms_norm(in[0], {}, in[1]).input};
      },
      [](const Tensors& in) -> Tensors {
        return {gateloop::ops::rms_norm_composite(in[0], in[1])};
      },
      {arguments[0], arguments[2]}, tolerance_);
}

TEST_P(OfDtype, LayerNormBehindAResidual) {
  expect_equal(
      [](const Tensors& in) -> Tensors {
        const auto n = gateloop::ops::add_then_layer_norm(in[0], in[1], in[2], in[3]);
        EXPECT_TRUE(n.stream.is_same(n.input));
        return {n.stream};
      },
      [](const Tensors& in) -> Tensors {
        return {torch::layer_norm(in[0] + in[1], {40}, in[2], in[3])};
      },
      {strided(40, options_), strided(40, options_), torch::randn({40}, options_),
       torch::randn({40}, options_)},
      tolerance_);
}

TEST_P(OfDtype, Gelu) {
  expect_equal([](const Tensors& in) -> Tensors { return {gateloop::ops::gelu(in[0])}; },
               [](const Tensors& in) -> Tensors { return {torch::gelu(in[0])}; },
               {strided(40, options_)}, tolerance_);
}

TEST_P(OfDtype, SwishGate) {
  expect_equal(
      [](const Tensors& in) -> Tensors { return {gateloop::ops::swish_gate(in[0], in[1])}; },
      [](const Tensors& in) -> Tensors { return {torch::silu(in[0]) * in[1]}; },
      {strided(40, options_), strided(40, options_)}, tolerance_);
}

TEST_P(OfDtype, Linear) {
  expect_equal(
      [](const Tensors& in) -> Tensors {
        return {gateloop::ops::linear(in[0], in[1], in[2]), gateloop::ops::linear(in[0], in[1])};
      },
      [](const Tensors& in) -> Tensors {
        return {torch::linear(in[0], in[1], in[2]), torch::linear(in[0], in[1])};
      },
      {strided(40, options_), torch::randn({24, 40}, options_), torch::randn({24}, options_)},
      tolerance_);
}

/// Large enough for oneDNN's products.
struct LargeLinear {
  Tensor x = torch::randn({4, 64, 80}), weight = torch::randn({96, 80}), bias = torch::randn({96});
};

TEST(Fused, LinearOfManyRows) {
  torch::manual_seed(13);
  const LargeLinear of;
  expect_equal(
      [](const Tensors& in) -> Tensors { return {gateloop::ops::linear(in[0], in[1], in[2])}; },
      [](const Tensors& in) -> Tensors { return {torch::linear(in[0], in[1], in[2])}; },
      {of.x, of.weight, of.bias}, kFloat32);
}

/// Negated without a copy, as imaginary parts of conjugates are.
TEST(Fused, LinearOfLazilyNegatedNumbers) {
  torch::manual_seed(14);
  const LargeLinear of;
  const auto x = of.x.clone().requires_grad_(), weight = of.weight.clone().requires_grad_();
  const auto y = gateloop::ops::linear(at::_neg_view(x), at::_neg_view(weight), of.bias);
  expect_close(y, torch::linear(of.x, of.weight, of.bias), kFloat32);
  const auto dy = torch::randn_like(y);
  const auto gradients = torch::autograd::grad({y}, {x, weight}, {at::_neg_view(dy)});
  expect_close(gradients[0], -dy.matmul(of.weight), kFloat32);
  expect_close(gradients[1], -dy.flatten(0, 1).t().matmul(of.x.flatten(0, 1)), kFloat32);
}

/// What is not needed backwards is not kept, and may change.
TEST(Fused, LinearOfFrozenOperands) {
  torch::manual_seed(15);
  const LargeLinear of;
  const auto x = of.x.clone().requires_grad_(), weight = of.weight.clone().requires_grad_();
  auto input = x * 1;
  auto y = gateloop::ops::linear(input, of.weight, of.bias);
  input.zero_();
  y.sum().backward();  // of ones that are one number in memory
  // Sums of 96 and 256 numbers of size one, which may cancel, are of the size of their roots.
  expect_close(x.grad(), of.weight.sum(0).expand_as(x), kFloat32, /*least=*/std::sqrt(96.0));

  auto constant = of.x.clone();
  auto used = weight * 1;
  y = gateloop::ops::linear(constant, used);
  used.zero_();
  y.sum().backward();
  expect_close(weight.grad(), of.x.sum({0, 1}).expand_as(weight), kFloat32, /*least=*/16);
}

TEST(Fused, NormsRefuseWhatTorchRefuses) {
  const auto x = torch::randn({2, 40});
  EXPECT_THROW(gateloop::ops::add_then_rms_norm(x, x, torch::ones({20})), c10::Error);
  EXPECT_THROW(gateloop::ops::add_then_layer_norm(x, x, torch::ones({40}), torch::ones({3})),
               c10::Error);
  EXPECT_THROW(gateloop::ops::add_then_rms_norm(x, torch::randn({2, 39}), torch::ones({40})),
               c10::Error);
}

/// The same tensor on both sides has both parts of the gradient.
TEST(Fused, ResidualOfATensorWithItself) {
  torch::manual_seed(16);
  const Tensors arguments = {torch::randn({3, 40}, torch::kDouble),
                             torch::randn({40}, torch::kDouble)};
  expect_equal(
      [](const Tensors& in) -> Tensors {
        return {gateloop::ops::add_then_rms_norm(in[0], in[0], in[1]).input};
      },
      [](const Tensors& in) -> Tensors {
        return {gateloop::ops::rms_norm_composite(in[0] + in[0], in[1])};
      },
      arguments, kFloat64);
}

TEST(Fused, LinearRefusesWhatTorchRefuses) {
  const auto x = torch::randn({2, 3}), weight = torch::randn({5, 4});
  EXPECT_THROW(gateloop::ops::linear(x, weight), c10::Error);
  EXPECT_EQ(gateloop::ops::linear(torch::randn({0, 4}), weight).sizes(),
            (std::vector<std::int64_t>{0, 5}));
  EXPECT_EQ(gateloop::ops::linear(torch::randn({4}), weight).sizes(),
            (std::vector<std::int64_t>{5}));
}

class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
  }
  ~Autocast() { at::autocast::set_autocast_enabled(at::kCPU, false); }
};

/// Autocast leaves float64 alone.
TEST(Fused, NormsOfFloat64UnderAutocast) {
  const auto x = torch::randn({2, 40}, torch::kDouble), gain = torch::ones({40}, torch::kDouble);
  const Autocast autocast;
  EXPECT_EQ(gateloop::ops::add_then_rms_norm(x, x, gain).input.scalar_type(), torch::kDouble);
  EXPECT_EQ(gateloop::ops::add_then_layer_norm(x, x, gain, gain).input.scalar_type(),
            torch::kDouble);
}

/// Of float32 x and bfloat16 y: streams stay float32, what products read is bfloat16.
TEST(Fused, NormsUnderAutocast) {
  torch::manual_seed(12);
  const auto x = torch::randn({2, 5, 40}), y = torch::randn({2, 5, 40}).to(torch::kBFloat16);
  const auto gain = torch::randn({40}), bias = torch::randn({40});
  for (const bool is_layer : {false, true}) {
    SCOPED_TRACE(is_layer);
    auto in = leaves({x, y, gain, bias});
    const auto normalised = [&] {
      const Autocast autocast;
      return is_layer ? gateloop::ops::add_then_layer_norm(in[0], in[1], in[2], in[3])
                      : gateloop::ops::add_then_rms_norm(in[0], in[1], in[2]);
    }();
    EXPECT_EQ(normalised.stream.scalar_type(), torch::kFloat);
    EXPECT_EQ(normalised.input.scalar_type(), torch::kBFloat16);
    const auto weight = torch::randn({2, 5, 40}), other = 2 * torch::randn({2, 5, 40});
    (normalised.stream * weight + normalised.input.to(torch::kFloat) * other).sum().backward();

    auto wide = leaves({x.to(torch::kDouble), y.to(torch::kDouble), gain.to(torch::kDouble),
                        bias.to(torch::kDouble)});
    const auto sum = wide[0] + wide[1];
    const auto norm = is_layer ? torch::layer_norm(sum, {40}, wide[2], wide[3])
                               : gateloop::ops::rms_norm_composite(sum, wide[2]);
    ((is_layer ? norm : sum) * weight + norm * other).sum().backward();
    expect_close(normalised.stream, is_layer ? norm : sum, 1e-6);
    expect_close(normalised.input, norm, 0x1p-8);  // rounded once
    for (const std::size_t i : {0, 1, 2, 3}) {
      if (i == 3 && !is_layer) continue;
      SCOPED_TRACE(i);
      EXPECT_EQ(in[i].grad().scalar_type(), in[i].scalar_type());
      // Gradients arrive in bfloat16: some roundings of 2^-8, which cancel less than their terms.
      i < 2 ? expect_close(in[i].grad(), wide[i].grad(), 0x1p-4)
            : expect_weights_close(in[i].grad(), wide[i].grad(), 0x1p-4);
      EXPECT_LE(norm_error(in[i].grad(), wide[i].grad()), 0x1p-8);
    }
  }
}

}  // namespace fused_test
