#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace gateloop::ops {

/// x / max(‖x‖, ε) √dim gamma over the last dimension, for x (..., dim) and gamma (dim), with the
/// reference's ε of 1e-12, in float16 2^-24. One pass each way where both are plain memory of a CPU
/// in one dtype, and torch's own operators, with all that they can, elsewhere.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gamma);

/// The kernels behind it, for plain memory of a CPU in one dtype: y (..., dim), and
/// (dx (..., dim), dgamma (dim)).
at::Tensor rms_norm_forward(const at::Tensor& x, const at::Tensor& gamma);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& gamma);

}  // namespace gateloop::ops
