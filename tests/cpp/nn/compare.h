#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

/// Of each channel the largest |value − reference| over its largest |reference|, in float64:
/// (channels). A channel is one index of `dim`: -1 of activations (..., channels), 0 of the
/// gradient of a weight, whose rows are output channels. A large channel hides no small one. A
/// channel counts as no smaller than `least`, where sums that cancel leave their roundings.
inline torch::Tensor channel_errors(const torch::Tensor& value, const torch::Tensor& reference,
                                    std::int64_t dim = -1, double least = 0) {
  const auto sizes = [dim](const torch::Tensor& t) {
    if (t.numel() == 0) return torch::zeros({0}, torch::kDouble);
    const auto numbers = t.dim() == 0 ? t.view({1}) : t.movedim(dim, 0);
    return std::get<0>(numbers.abs().reshape({numbers.size(0), -1}).max(1));
  };
  const auto wide = reference.is_complex() ? torch::kComplexDouble : torch::kDouble;
  const auto exact = reference.detach().to(wide);
  return sizes(value.detach().to(wide) - exact) /
         sizes(exact).clamp_min(std::max(least, std::numeric_limits<double>::min()));
}

/// Of the gradient of a weight, whose channels are its rows. One of a bias or a gain sums numbers
/// of both signs over all steps: where they cancel it counts as a sixteenth of the largest.
inline torch::Tensor weight_errors(const torch::Tensor& value, const torch::Tensor& reference,
                                   double least = 0) {
  if (reference.dim() == 1 && reference.numel() > 0) {
    least = std::max(least, reference.abs().max().item<double>() / 16);
  }
  return channel_errors(value, reference, 0, least);
}

/// Of the channel that has the largest.
inline double channel_error(const torch::Tensor& value, const torch::Tensor& reference) {
  const auto errors = channel_errors(value, reference);
  return errors.numel() > 0 ? errors.max().item<double>() : 0;
}

/// ‖value − reference‖₂ / ‖reference‖₂ in float64. Where numbers are rounded to bfloat16, many
/// roundings average in it, and its bound is the tighter one: beside channel errors, not instead.
inline double norm_error(const torch::Tensor& value, const torch::Tensor& reference) {
  const auto exact = reference.detach().to(torch::kDouble);
  return ((value.detach().to(torch::kDouble) - exact).norm() / exact.norm()).item<double>();
}

inline void expect_within(const torch::Tensor& errors, double tolerance) {
  if (errors.numel() == 0) return;
  EXPECT_LE(errors.max().item<double>(), tolerance)
      << "channel " << errors.argmax().item<std::int64_t>();
}

inline void expect_close(const torch::Tensor& value, const torch::Tensor& reference,
                         double tolerance, double least = 0) {
  ASSERT_EQ(value.sizes(), reference.sizes());
  expect_within(channel_errors(value, reference, -1, least), tolerance);
}

inline void expect_weights_close(const torch::Tensor& value, const torch::Tensor& reference,
                                 double tolerance, double least = 0) {
  ASSERT_EQ(value.sizes(), reference.sizes());
  expect_within(weight_errors(value, reference, least), tolerance);
}
