#pragma once

#include <ATen/ATen.h>

namespace gateloop::ops {

/// at::gelu(x), exact, with gradients of one pass on the CPU.
at::Tensor gelu(const at::Tensor& x);

/// silu(g) x, for g and x of one shape and dtype, one pass each way on the CPU.
at::Tensor swish_gate(const at::Tensor& g, const at::Tensor& x);

}  // namespace gateloop::ops
