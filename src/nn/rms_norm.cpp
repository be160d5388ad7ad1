#include "gateloop/nn/rms_norm.h"

#include <cmath>

#include "nn/common.h"

namespace gateloop::nn {

RMSNormImpl::RMSNormImpl(std::int64_t dim) : scale_(std::sqrt(static_cast<double>(dim))) {
  check_positive("RMSNorm", "dim", dim);
  gamma_ = register_parameter("gamma", torch::ones({dim}));
}

torch::Tensor RMSNormImpl::forward(const torch::Tensor& x) {
  // 1e-12 is zero in float16, whose least positive number is 2^-24.
  const double floor = x.scalar_type() == torch::kHalf ? 0x1p-24 : 1e-12;
  const auto norm = at::linalg_vector_norm(x, 2, -1, /*keepdim=*/true).clamp_min(floor);
  // √dim joins gamma, which is small, instead of taking a pass of its own over x.
  return x / norm * (gamma_ * scale_);
}

}  // namespace gateloop::nn
