#include "gateloop/nn/linear.h"

#include "ops/linear.h"

namespace gateloop::nn {

torch::Tensor LinearImpl::forward(const torch::Tensor& x) { return ops::linear(x, weight, bias); }

}  // namespace gateloop::nn
