#pragma once

#include <ATen/ATen.h>

namespace gateloop::ops {

/// A residual stream behind a norm, and what the next layer reads: in the dtype of autocast where
/// that is enabled.
struct Normalised {
  at::Tensor stream;
  at::Tensor input;
};

/// stream = x + y, input = rms_norm(stream, gamma); where y is undefined the stream is x. x, y
/// (..., dim), gamma (dim). One pass each way on the CPU where x and gamma are float32 or float64.
/// There y is in the dtype of autocast or, without autocast, in x's. Else torch's operators.
Normalised add_then_rms_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gamma);

/// stream = input = layer_norm(x + y) with an ε of 1e-5; weight, bias (dim). The same of dtypes.
Normalised add_then_layer_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight,
                               const at::Tensor& bias);

}  // namespace gateloop::ops
