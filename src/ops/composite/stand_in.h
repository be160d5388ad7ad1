#pragma once

#include <ATen/ATen.h>

namespace gateloop::ops {

/// Warns once where a definition runs in place of a kernel that another build has: on CUDA.
inline void warn_of_missing_kernels([[maybe_unused]] const at::Tensor& input) {
#ifndef GATELOOP_CUDA_KERNELS
  if (!input.is_cuda()) return;
  TORCH_WARN_ONCE(
      "gateloop: this build has no CUDA kernels; on CUDA its operators run as torch's operators, "
      "in many launches");
#endif
}

}  // namespace gateloop::ops
