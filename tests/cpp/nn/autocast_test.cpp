// bfloat16 through autocast and as the model's own dtype.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <ostream>
#include <string>
#include <vector>

#include "compare.h"
#include "gateloop/nn.h"

namespace autocast_test {

using namespace gateloop::nn;

// A bfloat16 rounding is up to 2^-8 of the value. Two layers with some ten roundings each along a
// path add up to about √20 · 2^-8 = 1.7 %, of the worst of some thousand numbers three to four
// times that.
constexpr double kTolerance = 0.08, kNormTolerance = 0.02;
// Gradients pass through as many roundings again, and sum them over steps where terms cancel: a row
// counts as no smaller than a quarter of the largest. Those of the transition also go through the
// phase of z. Its derivative is 1/|z|, which amplifies the rounding of the smallest z.
constexpr double kGradientTolerance = 0.4, kTransitionGradientTolerance = 0.6;
constexpr double kGradientNormTolerance = 0.06, kTransitionGradientNormTolerance = 0.15;

void expect_logits_close(const torch::Tensor& value, const torch::Tensor& exact, double norms = 1) {
  expect_close(value, exact, kTolerance);
  EXPECT_LE(norm_error(value, exact), norms * kNormTolerance);
}

class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
};

struct Case {
  std::string name;
  TransformerOptions options;
};

TransformerOptions base() { return {.num_tokens = 64, .dim = 64, .depth = 2}; }

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* name, auto change) {
    auto options = base();
    change(options);
    all.push_back({name, options});
  };
  add("polar", [](auto&) {});
  add("post_norm", [](auto& o) { o.post_ln_norm = true; });
  add("ablate_complex", [](auto& o) { o.ablate_complex = true; });
  add("ablate_state_transition", [](auto& o) { o.ablate_state_transition = true; });
  add("sigmoid",
      [](auto& o) { o.gate = Gate::kSigmoid, o.normalize_input = NormalizeInput::kMean; });
  add("heads", [](auto& o) { o.gate_loop_heads = 16; });
  add("heads_kept", [](auto& o) { o.gate_loop_heads = 16, o.checkpoint_gate_looped_attn = false; });
  add("heads_ablate_state_transition",
      [](auto& o) { o.gate_loop_heads = 16, o.ablate_state_transition = true; });
  add("attention", [](auto& o) { o.use_gate_looped_attn = false, o.dim_head = 16, o.heads = 4; });
  add("attention_rotary", [](auto& o) {
    o.use_gate_looped_attn = false, o.dim_head = 16, o.heads = 4, o.rotary_emb = true;
  });
  add("relative", [](auto& o) {
    o.use_gate_looped_attn = false, o.dim_head = 8, o.heads = 4, o.data_dependent_rel_pos = true;
  });
  return all;
}

class LowPrecision : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    torch::manual_seed(2);
    model_ = Transformer(GetParam().options);
    ids_ = torch::randint(64, {2, 40}, torch::kLong);
    if (GetParam().options.data_dependent_rel_pos) keep_phases_small();
  }

  /// Relative positions divide by the real part of a product of transitions: well conditioned where
  /// these lie near the positive real axis.
  void keep_phases_small() {
    const torch::NoGradGuard no_grad;
    for (auto& item : model_->named_parameters()) {
      auto& weight = item.value();
      if (item.key() == "token_emb.weight") weight.mul_(0.3).add_(1);
      if (!item.key().ends_with("to_a.0.weight")) continue;
      weight.slice(0, 0, std::nullopt, 2).abs_();
      weight.slice(0, 1, std::nullopt, 2).mul_(0.3);
    }
  }
  Transformer model_{nullptr};
  torch::Tensor ids_;
};

TEST_P(LowPrecision, AutocastTrains) {
  const auto exact = model_->loss(ids_);
  exact.backward();
  std::vector<torch::Tensor> exact_grads;
  for (const auto& p : model_->parameters()) exact_grads.push_back(p.grad());
  model_->zero_grad();
  torch::Tensor loss;
  {
    const Autocast autocast;
    loss = model_->loss(ids_);
  }
  EXPECT_EQ(loss.scalar_type(), torch::kFloat);
  loss.backward();
  expect_close(loss.detach(), exact.detach(), kTolerance);
  std::size_t i = 0;
  for (const auto& item : model_->named_parameters()) {
    SCOPED_TRACE(item.key());
    const auto& exact_grad = exact_grads[i++];
    ASSERT_EQ(item.value().grad().defined(), exact_grad.defined());
    if (!exact_grad.defined()) continue;
    EXPECT_EQ(item.value().grad().scalar_type(), torch::kFloat);
    const bool transition = item.key().find("to_a") != std::string::npos;
    // In ablate_complex a step with a small z outweighs whole rows.
    const double share = GetParam().name == "ablate_complex" ? 1 : 0.25;
    expect_weights_close(item.value().grad(), exact_grad,
                         transition ? kTransitionGradientTolerance : kGradientTolerance,
                         share * exact_grad.abs().max().item<double>());
    EXPECT_LE(norm_error(item.value().grad(), exact_grad),
              transition ? kTransitionGradientNormTolerance : kGradientNormTolerance);
  }
}

TEST_P(LowPrecision, AutocastStreamsWithAFloat32State) {
  const torch::NoGradGuard no_grad;
  const auto exact = model_->forward(ids_);
  const Autocast autocast;
  TransformerState state;
  std::vector<torch::Tensor> logits;
  for (std::int64_t t = 0; t < ids_.size(1); ++t) {
    logits.push_back(model_->forward(ids_.narrow(1, t, 1), &state));
  }
  expect_logits_close(torch::cat(logits, 1), exact);
  for (const auto& layer : state) {
    if (!layer.recurrence.defined()) continue;
    EXPECT_EQ(c10::toRealValueType(layer.recurrence.scalar_type()), torch::kFloat);
  }
}

TEST_P(LowPrecision, WholeModelInBFloat16) {
  const torch::NoGradGuard no_grad;
  const auto exact = model_->forward(ids_);
  model_->to(torch::kBFloat16);
  const auto logits = model_->forward(ids_);
  EXPECT_EQ(logits.scalar_type(), torch::kBFloat16);
  expect_logits_close(logits, exact, 2);  // weights, residuals and norms are rounded too
}

void PrintTo(const Case& test_case, std::ostream* out) { *out << test_case.name; }

INSTANTIATE_TEST_SUITE_P(Models, LowPrecision, testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace autocast_test
