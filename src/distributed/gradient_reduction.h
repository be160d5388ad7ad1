#pragma once

#include <torch/torch.h>

#include <functional>
#include <memory>
#include <vector>

#include "gateloop/distributed.h"

namespace c10d {
class Reducer;
}

namespace gateloop::distributed {

/// Sums gradients over processes while the backward pass still runs, in buckets of up to 25 MiB, by
/// c10d's Reducer. One process: does nothing.
///
/// The sums are the same bits on every process. They are so on every run with the same number of
/// processes too. The reason: the buckets hold the gradients in the order in which a first backward
/// pass gives them. That pass is made before the first step of every process.
class GradientReduction {
 public:
  /// `backward` runs a pass that reaches every parameter that training reaches; its gradients are
  /// dropped. `sent` is the dtype in which gradients travel: kFloat32 as they are, or kBFloat16.
  GradientReduction(const Communicator& communicator, const std::vector<torch::Tensor>& parameters,
                    torch::ScalarType sent, const std::function<void()>& backward);
  ~GradientReduction();
  GradientReduction(const GradientReduction&) = delete;
  GradientReduction& operator=(const GradientReduction&) = delete;

  /// After the next backward pass every .grad is the sum over the processes of what it holds then.
  void prepare();
  /// After that pass.
  void finish();

 private:
  std::unique_ptr<c10d::Reducer> reducer_;
};

}  // namespace gateloop::distributed
