#include "training/optimizer.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>

#include <stdexcept>

namespace gateloop::training {

Optimizer::Optimizer(const torch::nn::Module& model, const TrainingOptions& options)
    : decoupled_decay_(options.optimizer == "adamw"),
      beta1_(options.beta1),
      beta2_(options.beta2),
      epsilon_(options.epsilon),
      weight_decay_(options.weight_decay),
      clip_(options.clip) {
  for (const auto& item : model.named_parameters()) {
    const torch::Tensor& value = item.value();
    if (!value.requires_grad()) continue;
    parameters_.push_back({item.key(), value, torch::zeros_like(value), torch::zeros_like(value),
                           value.dim() >= 2 && weight_decay_ > 0});
  }
  // The fused kernels read it where the parameters are.
  if (!parameters_.empty()) updates_ = updates_.to(parameters_.front().value.device());
}

double Optimizer::gradient_norm() const {
  std::vector<torch::Tensor> gradients;
  for (const Parameter& parameter : parameters_) {
    if (parameter.value.grad().defined()) gradients.push_back(parameter.value.grad());
  }
  if (gradients.empty()) return 0;
  const torch::NoGradGuard no_grad;
  return torch::stack(at::_foreach_norm(gradients, 2)).norm().item<double>();
}

void Optimizer::step(double learning_rate, double gradient_norm) {
  const torch::NoGradGuard no_grad;
  // The fused kernel divides the gradients by grad_scale as it reads them: clipping costs no pass
  // of its own. The 1e-6 is clip_grad_norm_'s.
  std::optional<torch::Tensor> grad_scale;
  if (clip_ > 0 && gradient_norm + 1e-6 > clip_) {
    grad_scale = torch::full({}, (gradient_norm + 1e-6) / clip_, updates_.options());
  }
  updates_ += 1;
  update(/*decaying=*/false, learning_rate, grad_scale);
  update(/*decaying=*/true, learning_rate, grad_scale);
}

void Optimizer::update(bool decaying, double learning_rate,
                       const std::optional<torch::Tensor>& grad_scale) {
  std::vector<torch::Tensor> values, gradients, exp_avgs, exp_avg_sqs, updates;
  for (const Parameter& parameter : parameters_) {
    const torch::Tensor& gradient = parameter.value.grad();
    if (parameter.decays != decaying || !gradient.defined()) continue;
    values.push_back(parameter.value);
    // The kernel walks memory: gradients take the parameter's layout (contiguous).
    gradients.push_back(gradient.contiguous());
    exp_avgs.push_back(parameter.exp_avg);
    exp_avg_sqs.push_back(parameter.exp_avg_sq);
    updates.push_back(updates_);
  }
  if (values.empty()) return;
  const double weight_decay = decaying ? weight_decay_ : 0.0;
  if (decoupled_decay_) {
    at::_fused_adamw_(values, gradients, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, updates,
                      learning_rate, beta1_, beta2_, weight_decay, epsilon_, /*amsgrad=*/false,
                      /*maximize=*/false, grad_scale);
  } else {
    at::_fused_adam_(values, gradients, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, updates,
                     learning_rate, beta1_, beta2_, weight_decay, epsilon_, /*amsgrad=*/false,
                     /*maximize=*/false, grad_scale);
  }
}

void Optimizer::zero_grad() {
  for (Parameter& parameter : parameters_) parameter.value.mutable_grad().reset();
}

std::map<std::string, torch::Tensor> Optimizer::state() const {
  std::map<std::string, torch::Tensor> tensors;
  for (const Parameter& parameter : parameters_) {
    tensors["exp_avg." + parameter.name] = parameter.exp_avg;
    tensors["exp_avg_sq." + parameter.name] = parameter.exp_avg_sq;
  }
  return tensors;
}

void Optimizer::load(const std::map<std::string, torch::Tensor>& state, std::int64_t updates) {
  const torch::NoGradGuard no_grad;
  for (auto& [name, moment] : this->state()) {
    const auto found = state.find(name);
    if (found == state.end()) throw std::runtime_error("missing " + name);
    if (found->second.sizes() != moment.sizes()) {
      throw std::runtime_error(name + " has another shape than the model's parameter");
    }
    torch::Tensor target = moment;  // shares the memory of the optimiser's own
    target.copy_(found->second);
  }
  updates_.fill_(static_cast<double>(updates));
}

}  // namespace gateloop::training
