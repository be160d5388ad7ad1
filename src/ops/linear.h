#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace gateloop::ops {

/// x Wᵀ + b for x (..., in), weight (out, in) or packed(weight), bias (out): as at::linear, but one
/// row that nothing differentiates meets a kernel of our own. A packed weight has no gradient.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);

/// A copy of weight (out, in) in the layout of oneDNN's products, for many calls of linear(); or
/// weight itself where oneDNN is absent or has no products for it. On a Zen 4, (2048, 512) in
/// float32 by at::linear and packed: 8 rows 67 and 167 Gflop/s, 64 rows 139 and 224, 1024 rows 204
/// and 227.
at::Tensor packed(const at::Tensor& weight);

/// Moves weight to large pages where the system can; see host/weight_memory.h. For weights that
/// many products with one row will read, as they lie. Leaves alone what is not plain memory of a
/// CPU.
void move_to_large_pages(const at::Tensor& weight);

}  // namespace gateloop::ops
