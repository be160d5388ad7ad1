#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "gateloop/nn/transformer.h"

namespace gateloop::training {

/// A model and copies of it that share its weights; each has its own gradients. Threads run them at
/// the same time on different rows. So they need not meet at every operator.
class Replicas {
 public:
  /// `count` models, the first of them `model` itself. More than one only on the CPU.
  Replicas(const nn::Transformer& model, std::int64_t count);

  std::int64_t count() const { return static_cast<std::int64_t>(models_.size()); }

  /// work(replica, i) for i < n, n at most count(): at the same time and each on one thread, or if
  /// n is one on all threads. An exception in one is thrown when all have ended.
  void for_each(std::int64_t n, const std::function<void(nn::Transformer&, std::int64_t)>& work);

  /// Adds the copies' gradients to the model's, in one order, and drops them. After a backward pass
  /// of the model.
  void gather_gradients();

 private:
  std::vector<nn::Transformer> models_;
};

}  // namespace gateloop::training
