#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace gateloop::nn {

/// y = x / max(‖x‖₂, 1e-12) · √dim · gamma, over the last dimension (Zhang & Sennrich 2019). The
/// floor on the norm is the reference's, but in float16 2^-24: a row of zeros gives zeros.
/// Parameter: gamma (dim), ones.
class RMSNormImpl : public torch::nn::Module {
 public:
  explicit RMSNormImpl(std::int64_t dim);

  /// x (..., dim), any floating dtype -> the same shape.
  torch::Tensor forward(const torch::Tensor& x);
  const torch::Tensor& gamma() const { return gamma_; }

 private:
  torch::Tensor gamma_;
};
TORCH_MODULE(RMSNorm);

}  // namespace gateloop::nn
