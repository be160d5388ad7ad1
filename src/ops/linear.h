#pragma once

#include <ATen/ATen.h>

#include "ops/internal.h"

namespace gateloop::ops {

/// at::linear(x, weight, bias): (..., N), for x (..., K), weight (N, K), bias (N). Products in
/// float32 come from oneDNN where torch takes them from slower kernels of MKL's.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias = {});

}  // namespace gateloop::ops
