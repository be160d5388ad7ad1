#include "ops/composite/stand_in.h"

namespace gateloop::ops {

void warn_of_missing_kernels([[maybe_unused]] const at::Tensor& input) {
#ifndef GATELOOP_CUDA_KERNELS
  if (!input.is_cuda()) return;
  TORCH_WARN_ONCE(
      "gateloop: this build has no CUDA kernels; on CUDA its operators run as torch's operators, "
      "in many launches");
#endif
}

}  // namespace gateloop::ops
