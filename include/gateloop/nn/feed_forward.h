#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "gateloop/nn/linear.h"

namespace gateloop::nn {

/// The channel mixer: Linear(dim, dim · mult), exact GELU, Linear(dim · mult, dim).
/// Parameters: 0.weight, 0.bias, 2.weight, 2.bias.
class FeedForwardImpl : public torch::nn::Module {
 public:
  explicit FeedForwardImpl(std::int64_t dim, std::int64_t mult = 4);

  /// x (..., dim) -> (..., dim).
  torch::Tensor forward(const torch::Tensor& x);

 private:
  Linear expand_{nullptr}, contract_{nullptr};
};
TORCH_MODULE(FeedForward);

}  // namespace gateloop::nn
