#pragma once

#include <torch/torch.h>

#include <unordered_map>

namespace gateloop::nn {

/// Copies of the matrices of a model's projections for many products: see ops::packed().
/// They keep the values that the model has now.
class PackedWeights {
 public:
  explicit PackedWeights(const torch::nn::Module& model);

  /// While it lives, project() on this thread multiplies by these copies; null: by none.
  class Use {
   public:
    explicit Use(const PackedWeights* weights);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    const PackedWeights* before_;
  };

  /// The copy in use, or `weight` itself.
  static const torch::Tensor& or_own(const torch::Tensor& weight);

 private:
  std::unordered_map<const at::TensorImpl*, torch::Tensor> copies_;
};

/// Moves the matrices of a model's projections to large pages, for many products with one row.
void move_to_large_pages(const torch::nn::Module& model);

}  // namespace gateloop::nn
