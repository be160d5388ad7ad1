#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace gateloop::nn {

/// Rotary position embedding (Su et al. 2021): channels 2i and 2i+1 turn together by position ·
/// 10000^(-2i/dim_head). Parameter: freqs (dim_head / 2), not trained, float32 or wider: in a model
/// of bfloat16 or float16 it stays float32, because position 300 multiplies its rounding by 300.
class RotaryEmbedding : public torch::nn::Module {
 public:
  explicit RotaryEmbedding(std::int64_t dim_head);

  using torch::nn::Module::to;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;

  /// (cos, sin), each (T, 1, dim_head / 2) in the dtype of freqs, for positions first, first + 1,
  /// ...
  struct Angles {
    torch::Tensor cos, sin;
  };
  Angles angles(std::int64_t first, std::int64_t time) const;
  /// For the positions (B, T) of each step: (B, T, 1, dim_head / 2).
  Angles angles(const torch::Tensor& positions) const;

  /// t (B, T, H, dim_head) -> the same shape and dtype.
  static torch::Tensor rotate(const torch::Tensor& t, const Angles& angles);

 private:
  torch::Tensor freqs_;
};

}  // namespace gateloop::nn
