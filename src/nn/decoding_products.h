#pragma once

#include <torch/torch.h>

#include <unordered_map>

namespace gateloop::nn {

/// How a Decoder multiplies by the matrices of a model's projections.
class DecodingProducts {
 public:
  /// Copies the matrices, with the values they have now, into the layout of ops::packed().
  void pack(const torch::nn::Module& model);

  /// layer(x) for x (B, T, in): one row by ops::linear(), two and more sequences by the packed
  /// copy, one sequence, whose prompt is read once, as the layer does.
  torch::Tensor multiply(const torch::nn::LinearImpl& layer, const torch::Tensor& x) const;

  /// While it lives, project() on this thread multiplies by these products.
  class Scope {
   public:
    explicit Scope(const DecodingProducts& products);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const DecodingProducts* before_;
  };

  /// Those of the innermost Scope on this thread, or null.
  static const DecodingProducts* in_use();

 private:
  std::unordered_map<const at::TensorImpl*, torch::Tensor> packed_;
};

/// Moves the matrices of a model's projections to large pages, for many products with one row.
void move_to_large_pages(const torch::nn::Module& model);

}  // namespace gateloop::nn
