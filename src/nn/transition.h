#pragma once

/// What happens between the projection of a transition and the recurrence that uses it.
#include <torch/torch.h>

namespace gateloop::nn {

/// Lets the projection behind z learn more slowly: the value stays, the gradient is scaled. Costs
/// nothing where no gradient is taken. `z` must be fresh from its projection.
void scale_gradient(const torch::Tensor& z, double fraction);

/// (..., 2 C) with (re, im) interleaved -> the same with im = 0: the `complex` ablation.
torch::Tensor drop_imaginary(const torch::Tensor& z);

/// (..., 2 C) with (re, im) interleaved -> a = σ(|z|) z/|z|, (..., C) complex; a = 0.5 at z = 0
/// (arXiv 2311.01927, section 3.2). bfloat16 and float16 come out as complex64.
torch::Tensor polar_gate(const torch::Tensor& z);

}  // namespace gateloop::nn
