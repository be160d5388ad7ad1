#pragma once

/// What happens between the projection of a transition and the recurrence that uses it.
#include <torch/torch.h>

#include "gateloop/model.h"

namespace gateloop::nn {

/// Scales the gradient of the projection behind z and keeps the value, so that it is trained more
/// slowly. Costs nothing where no gradient is taken. `z` must be fresh from its projection.
void scale_gradient(const torch::Tensor& z, double fraction);

/// (..., 2 C) with (re, im) interleaved -> the same with im = 0: the `complex` ablation.
torch::Tensor drop_imaginary(const torch::Tensor& z);

/// Raw transitions z, of each the numbers that its gate takes, -> a (..., C), complex but for the
/// sigmoid gate: polar σ(|z|) z/|z|, 0.5 at z = 0, sigmoid σ(z), magnitude_phase σ(m) e^{iθ} (arXiv
/// 2311.01927, section 3.2). bfloat16 and float16 come out as float32 and complex64.
torch::Tensor transition_of(const torch::Tensor& z, model::Gate gate);

/// What the input is scaled by: 1 - |a| or √(1 - |a|²), (..., C) real; exact where |a| is near 1.
torch::Tensor input_scale(const torch::Tensor& z, model::Gate gate,
                          model::NormalizeInput normalize);

}  // namespace gateloop::nn
