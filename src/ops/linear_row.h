#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace gateloop::ops {

/// Whether linear_row() can take the place of at::linear: one row, nothing to differentiate, and
/// dense, contiguous operands of one floating dtype on the CPU.
bool is_linear_row(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias);

/// x Wᵀ + b for one row x (..., 1, in), weight (out, in), bias (out), for which is_linear_row()
/// holds: decoding one sequence, bound by reading W once. MKL's and oneDNN's products do that on
/// one thread, and bfloat16 at a quarter of the speed of memory. Sums are float32 or wider.
at::Tensor linear_row(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias);

}  // namespace gateloop::ops
