#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace gateloop::ops {

/// gateloop::rms_norm: x / max(‖x‖, ε) √dim gamma over the last dimension. x (..., dim) and gamma
/// (dim) have floating dtypes; the result has the wider of them. ε is the reference's 1e-12, and
/// 2^-24 in float16, where 1e-12 is zero. Throws c10::Error for a gamma or a dtype that does not
/// fit.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gamma);

/// gateloop::_rms_norm_backward -> (dx (..., dim), dgamma (dim)); dy is as y.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& gamma);

/// What the kernels of all dispatch keys check.
void check_rms_norm(const at::Tensor& x, const at::Tensor& gamma);
void check_rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gamma);

/// Both in torch's operators: for any device, and differentiable in turn.
at::Tensor rms_norm_composite(const at::Tensor& x, const at::Tensor& gamma);
std::tuple<at::Tensor, at::Tensor> rms_norm_backward_composite(const at::Tensor& dy,
                                                               const at::Tensor& x,
                                                               const at::Tensor& gamma);

}  // namespace gateloop::ops
