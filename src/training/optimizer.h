#pragma once

#include <torch/torch.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gateloop/distributed.h"
#include "gateloop/training.h"

namespace gateloop::training {

/// Adam or AdamW in one fused pass over parameters, gradients and moments. Equals torch.optim.Adam
/// / AdamW after clip_grad_norm_, to rounding.
///
/// With options.shard_optimizer each parameter belongs to one process (stage 1 of ZeRO, arXiv
/// 1910.02054). That process alone holds its moments and updates it. Without the option every
/// process updates all.
class Optimizer {
 public:
  Optimizer(const torch::nn::Module& model, const TrainingOptions& options,
            distributed::Communicator communicator = {});

  /// Global L2 norm of the gradients there are.
  double gradient_norm() const;
  /// One update at `learning_rate`, the gradients scaled to norm `clip` if `gradient_norm` is above
  /// it. Gradients are used up; zero_grad() drops them. Parameters are the same on every process
  /// afterwards, as their gradients were.
  void step(double learning_rate, double gradient_norm);
  /// Drops the gradients: the next backward pass then moves its results in instead of adding them.
  void zero_grad();

  /// Every process calls it: moments by "exp_avg.NAME" and "exp_avg_sq.NAME", all of them on
  /// process 0, none on the others. Those that process 0 holds are not copies.
  std::map<std::string, torch::Tensor> state() const;
  /// Throws std::runtime_error naming a tensor that is missing or misshapen.
  void check(const std::map<std::string, torch::Tensor>& state) const;
  /// Every process calls it: continues after `updates` updates with the moments that process 0
  /// gives, which check() has passed.
  void load(const std::map<std::string, torch::Tensor>& state, std::int64_t updates);

 private:
  struct Parameter {
    std::string name;
    torch::Tensor value;
    torch::Tensor exp_avg, exp_avg_sq;  // of value's shape, float32; undefined on other processes
    bool decays = false;
    int owner = 0;  // process that updates it where they are shared out
  };
  void share_out();
  bool is_mine(const Parameter& parameter) const;
  void broadcast_parameters() const;
  void update(bool decaying, double learning_rate, const std::optional<torch::Tensor>& grad_scale);

  distributed::Communicator communicator_;
  bool sharded_;
  std::vector<Parameter> parameters_;
  bool decoupled_decay_;
  double beta1_, beta2_, epsilon_, weight_decay_, clip_;
  torch::Tensor updates_ = torch::zeros({}, torch::kFloat32);  // () one counter for all
};

}  // namespace gateloop::training
