#pragma once

#include <torch/torch.h>

#include <map>
#include <string>
#include <vector>

#include "gateloop/training.h"

namespace gateloop::training {

/// Adam or AdamW in one fused pass over parameters, gradients and moments. Equals torch.optim.Adam
/// / AdamW after clip_grad_norm_, to rounding.
class Optimizer {
 public:
  Optimizer(const torch::nn::Module& model, const TrainingOptions& options);

  /// Global L2 norm of the gradients there are.
  double gradient_norm() const;
  /// One update at `learning_rate`, the gradients scaled to norm `clip` if `gradient_norm` is above
  /// it. Gradients are used up; zero_grad() drops them.
  void step(double learning_rate, double gradient_norm);
  /// Drops the gradients: the next backward pass then moves its results in instead of adding them.
  void zero_grad();

  /// Moments by "exp_avg.NAME" and "exp_avg_sq.NAME"; not copies.
  std::map<std::string, torch::Tensor> state() const;
  /// Continues after `updates` updates with these moments. Throws std::runtime_error naming a
  /// tensor that is missing or misshapen.
  void load(const std::map<std::string, torch::Tensor>& state, std::int64_t updates);

 private:
  struct Parameter {
    std::string name;
    torch::Tensor value, exp_avg, exp_avg_sq;  // all of one shape, float32
    bool decays = false;
  };
  void update(bool decaying, double learning_rate, const std::optional<torch::Tensor>& grad_scale);

  std::vector<Parameter> parameters_;
  bool decoupled_decay_;
  double beta1_, beta2_, epsilon_, weight_decay_, clip_;
  torch::Tensor updates_ = torch::zeros({}, torch::kFloat32);  // () one counter for all
};

}  // namespace gateloop::training
