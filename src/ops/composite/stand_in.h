#pragma once

#include <ATen/ATen.h>

namespace gateloop::ops {

/// Warns once where a definition runs in place of a kernel that another build has: on CUDA.
void warn_of_missing_kernels(const at::Tensor& input);

}  // namespace gateloop::ops
