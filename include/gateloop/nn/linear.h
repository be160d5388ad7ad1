#pragma once

#include <torch/torch.h>

namespace gateloop::nn {

/// torch.nn.Linear: x weightᵀ + bias, with the processor's fastest products. Parameters: weight
/// (out_features, in_features) and, unless options say no, bias (out_features).
class LinearImpl : public torch::nn::LinearImpl {
 public:
  using torch::nn::LinearImpl::LinearImpl;

  /// x (..., in_features) -> (..., out_features).
  torch::Tensor forward(const torch::Tensor& x);
};
TORCH_MODULE(Linear);

}  // namespace gateloop::nn
