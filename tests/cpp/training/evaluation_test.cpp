#include "gateloop/evaluation.h"

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "models.h"

namespace gateloop::training {
namespace {

std::vector<std::uint8_t> some_text(std::int64_t size) {
  torch::manual_seed(2);
  const auto bytes = torch::randint(256, {size}, torch::kUInt8);
  const auto* begin = bytes.data_ptr<std::uint8_t>();
  return {begin, begin + size};
}

/// Nats of predicting text[begin + 1 .. begin + length] by the model's own loss.
double direct(nn::Transformer& model, const std::vector<std::uint8_t>& text, std::int64_t begin,
              std::int64_t length) {
  const torch::NoGradGuard no_grad;
  auto ids = torch::empty({1, length + 1}, torch::kInt64);
  for (std::int64_t t = 0; t <= length; ++t) ids[0][t] = text[static_cast<std::size_t>(begin + t)];
  return model->loss(ids).item<double>() * static_cast<double>(length);
}

// Sums in another order, in double precision.
constexpr double kRelative = 1e-10;

class EvaluateWindows : public testing::TestWithParam<std::tuple<int, int>> {};

TEST_P(EvaluateWindows, IsTheDirectLossOfEachWindow) {
  const auto [size, per_pass] = GetParam();
  auto model = test::make_model(test::small_options());
  const auto text = some_text(size);
  constexpr std::int64_t kWindow = 8;
  double expected = 0;
  for (std::int64_t begin = 0; begin < size - 1; begin += kWindow)
    expected += direct(model, text, begin, std::min<std::int64_t>(kWindow, size - 1 - begin));
  EvaluationOptions options;
  options.length = kWindow;
  options.bytes_per_pass = per_pass;
  const auto score = evaluate_windows(model, text, options);
  EXPECT_EQ(score.bytes, size - 1);
  EXPECT_NEAR(score.nats, expected, kRelative * expected);
  EXPECT_NEAR(score.bits_per_byte(), expected / (size - 1) / std::log(2.0), 1e-9);
}

// Sizes around whole windows of 8; passes of less than one window, of one, of several.
INSTANTIATE_TEST_SUITE_P(Sizes, EvaluateWindows,
                         testing::Combine(testing::Values(2, 8, 9, 10, 17, 60),
                                          testing::Values(1, 8, 27, 4096)));

TEST(EvaluateWindows, AFewAreEvenlySpacedWholeOnes) {
  auto model = test::make_model(test::small_options());
  const auto text = some_text(60);  // 7 whole windows of 8 and a rest of 3
  const double expected = direct(model, text, 0, 8) + direct(model, text, 16, 8) +
                          direct(model, text, 32, 8);  // 0, 7/3 and 14/3 of 7, rounded down
  for (const std::int64_t per_pass : {1, 16, 4096}) {
    EvaluationOptions options;
    options.length = 8;
    options.windows = 3;
    options.bytes_per_pass = per_pass;
    const auto score = evaluate_windows(model, text, options);
    EXPECT_EQ(score.bytes, 24);
    EXPECT_NEAR(score.nats, expected, kRelative * expected);
  }
}

TEST(EvaluateWindows, WorksForAttention) {
  auto options = test::small_options();
  options.use_gate_looped_attn = false;
  auto model = test::make_model(options);
  const auto text = some_text(20);
  const auto expected = direct(model, text, 0, 19);
  EXPECT_NEAR(evaluate_windows(model, text).nats, expected, kRelative * expected);
}

TEST(Evaluate, ReportsProgressToTheEnd) {
  auto model = test::make_model(test::small_options());
  std::vector<std::int64_t> seen;
  EvaluationOptions options;
  options.length = 8;
  options.bytes_per_pass = 16;
  options.progress = [&](std::int64_t done, std::int64_t total) {
    EXPECT_EQ(total, 40);
    seen.push_back(done);
  };
  evaluate_windows(model, some_text(41), options);
  EXPECT_EQ(seen, (std::vector<std::int64_t>{16, 32, 40}));
}

TEST(Evaluate, RefusesWhatItCannotRead) {
  auto options = test::small_options();
  options.num_tokens = 100;
  auto model = test::make_model(options);
  EXPECT_THROW(evaluate_windows(model, std::vector<std::uint8_t>{1, 100}), std::invalid_argument);
  EXPECT_THROW(evaluate_windows(model, std::vector<std::uint8_t>{1}), std::invalid_argument);
  EvaluationOptions bad;
  bad.length = 0;
  EXPECT_THROW(evaluate_windows(model, std::vector<std::uint8_t>{1, 2}, bad),
               std::invalid_argument);
}

TEST(Evaluate, InTheMiddleOfTrainingUnderAutocastLeavesItAsItWas) {
  // Autocast keeps bfloat16 copies of the weights until its outermost scope ends. A copy made by
  // evaluation takes no gradient: used in the next step, it would silently freeze its weight.
  torch::manual_seed(1);
  nn::Transformer model(test::small_options());
  const auto text = some_text(65);
  const auto exact = evaluate_windows(model, text);
  model->train();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  EvaluationOptions options;
  options.dtype = torch::kBFloat16;
  const auto score = evaluate_windows(model, text, options);
  EXPECT_TRUE(at::autocast::is_autocast_enabled(at::kCPU));
  EXPECT_TRUE(model->is_training());
  model->loss(torch::randint(256, {2, 9}, torch::kInt64)).backward();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  for (const auto& item : model->named_parameters())
    EXPECT_TRUE(item.value().grad().defined()) << item.key();
  // bfloat16 keeps 8 bits; the errors of 64 predictions average out.
  EXPECT_NEAR(score.bits_per_byte(), exact.bits_per_byte(), 0.02);
}

}  // namespace
}  // namespace gateloop::training
