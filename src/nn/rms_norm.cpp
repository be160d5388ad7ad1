#include "gateloop/nn/rms_norm.h"

#include "nn/common.h"
#include "ops/rms_norm.h"

namespace gateloop::nn {

RMSNormImpl::RMSNormImpl(std::int64_t dim) {
  check_positive("RMSNorm", "dim", dim);
  gamma_ = register_parameter("gamma", torch::ones({dim}));
}

torch::Tensor RMSNormImpl::forward(const torch::Tensor& x) { return ops::rms_norm(x, gamma_); }

}  // namespace gateloop::nn
