#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace gateloop::ops {

/// x Wᵀ + b for x (..., in), weight (out, in) or packed(weight), bias (out): as at::linear, but one
/// row that nothing differentiates meets a kernel of our own. A packed weight has no gradient.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);

/// A copy of weight (out, in) in the layout of oneDNN's products, for many calls of linear() with
/// a few rows; or weight itself where oneDNN is absent or has no products for it. On a Zen 4,
/// (2048, 512) by 64 rows: float32 139 Gflop/s by at::linear, 224 packed; by 8 rows 67 and 167.
/// With weights that come from memory, all of a model: bfloat16, 64 rows, 19.5 ms and 15.2.
at::Tensor packed(const at::Tensor& weight);

}  // namespace gateloop::ops
