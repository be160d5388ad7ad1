#pragma once

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>

/// ‖value − reference‖₂ / ‖reference‖₂ in float64; the absolute norm where the reference is zero.
inline double relative_error(const torch::Tensor& value, const torch::Tensor& reference) {
  const auto wide = reference.is_complex() ? torch::kComplexDouble : torch::kDouble;
  const auto difference = (value.to(wide) - reference.to(wide)).norm().item<double>();
  const auto norm = reference.to(wide).norm().item<double>();
  return norm > 0 ? difference / norm : difference;
}

inline void expect_close(const torch::Tensor& value, const torch::Tensor& reference,
                         double tolerance) {
  ASSERT_EQ(value.sizes(), reference.sizes());
  EXPECT_LE(relative_error(value, reference), tolerance);
}

/// As expect_close, for each channel of (..., channels) alone: a small one cannot hide.
inline void expect_channels_close(const torch::Tensor& value, const torch::Tensor& reference,
                                  double tolerance) {
  ASSERT_EQ(value.sizes(), reference.sizes());
  const auto values = value.flatten(0, -2).unbind(-1),
             references = reference.flatten(0, -2).unbind(-1);
  for (std::size_t c = 0; c < values.size(); ++c)
    EXPECT_LE(relative_error(values[c], references[c]), tolerance) << "channel " << c;
}
