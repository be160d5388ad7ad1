#include "training/optimizer.h"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>

#include <algorithm>
#include <stdexcept>

namespace gateloop::training {

namespace {

/// Names of a parameter's moments in a state file.
std::string exp_avg_name(const std::string& parameter) { return "exp_avg." + parameter; }
std::string exp_avg_sq_name(const std::string& parameter) { return "exp_avg_sq." + parameter; }

}  // namespace

Optimizer::Optimizer(const torch::nn::Module& model, const TrainingOptions& options,
                     distributed::Communicator communicator)
    : communicator_(std::move(communicator)),
      sharded_(options.shard_optimizer && communicator_.size() > 1),
      decoupled_decay_(options.optimizer == "adamw"),
      beta1_(options.beta1),
      beta2_(options.beta2),
      epsilon_(options.epsilon),
      weight_decay_(options.weight_decay),
      clip_(options.clip) {
  for (const auto& item : model.named_parameters()) {
    const torch::Tensor& value = item.value();
    if (!value.requires_grad()) continue;
    parameters_.push_back({.name = item.key(),
                           .value = value,
                           .exp_avg = {},
                           .exp_avg_sq = {},
                           .decays = value.dim() >= 2 && weight_decay_ > 0});
  }
  if (sharded_) share_out();
  for (Parameter& parameter : parameters_) {
    if (!is_mine(parameter)) continue;
    parameter.exp_avg = torch::zeros_like(parameter.value);
    parameter.exp_avg_sq = torch::zeros_like(parameter.value);
  }
  // The fused kernels read it where the parameters are.
  if (!parameters_.empty()) updates_ = updates_.to(parameters_.front().value.device());
}

bool Optimizer::is_mine(const Parameter& parameter) const {
  return !sharded_ || parameter.owner == communicator_.rank();
}

/// Largest first, each to the process that has least so far.
void Optimizer::share_out() {
  std::vector<Parameter*> order;
  for (Parameter& parameter : parameters_) order.push_back(&parameter);
  std::stable_sort(order.begin(), order.end(), [](const Parameter* a, const Parameter* b) {
    return a->value.numel() > b->value.numel();
  });
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(communicator_.size()), 0);
  for (Parameter* parameter : order) {
    const auto least = std::min_element(numbers.begin(), numbers.end());
    *least += parameter->value.numel();
    parameter->owner = static_cast<int>(least - numbers.begin());
  }
}

void Optimizer::broadcast_parameters() const {
  for (int owner = 0; owner < communicator_.size(); ++owner) {
    std::vector<torch::Tensor> values;
    for (const Parameter& parameter : parameters_) {
      if (parameter.owner == owner) values.push_back(parameter.value);
    }
    if (!values.empty()) communicator_.broadcast(values, owner);
  }
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
  if (sharded_) broadcast_parameters();
}

void Optimizer::update(bool decaying, double learning_rate,
                       const std::optional<torch::Tensor>& grad_scale) {
  std::vector<torch::Tensor> values, gradients, exp_avgs, exp_avg_sqs, updates;
  for (const Parameter& parameter : parameters_) {
    const torch::Tensor& gradient = parameter.value.grad();
    if (parameter.decays != decaying || !gradient.defined() || !is_mine(parameter)) continue;
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
    if (!communicator_.is_main() && !(sharded_ && is_mine(parameter))) continue;
    torch::Tensor exp_avg = parameter.exp_avg;
    torch::Tensor exp_avg_sq = parameter.exp_avg_sq;
    if (!is_mine(parameter)) {
      exp_avg = torch::empty_like(parameter.value);
      exp_avg_sq = torch::empty_like(parameter.value);
    }
    communicator_.send_to_main(exp_avg, parameter.owner);
    communicator_.send_to_main(exp_avg_sq, parameter.owner);
    if (!communicator_.is_main()) continue;
    tensors[exp_avg_name(parameter.name)] = exp_avg;
    tensors[exp_avg_sq_name(parameter.name)] = exp_avg_sq;
  }
  return tensors;
}

void Optimizer::check(const std::map<std::string, torch::Tensor>& state) const {
  for (const Parameter& parameter : parameters_) {
    for (const std::string& name :
         {exp_avg_name(parameter.name), exp_avg_sq_name(parameter.name)}) {
      const auto found = state.find(name);
      if (found == state.end()) throw std::runtime_error("missing " + name);
      if (found->second.sizes() != parameter.value.sizes()) {
        throw std::runtime_error(name + " has another shape than the model's parameter");
      }
    }
  }
}

void Optimizer::load(const std::map<std::string, torch::Tensor>& state, std::int64_t updates) {
  const torch::NoGradGuard no_grad;
  const auto load_one = [&](const std::string& name, const Parameter& parameter,
                            const torch::Tensor& moment) {
    torch::Tensor given = torch::empty_like(parameter.value);
    if (communicator_.is_main()) given.copy_(state.at(name));
    communicator_.broadcast({given});
    if (is_mine(parameter)) moment.copy_(given);
  };
  for (const Parameter& parameter : parameters_) {
    load_one(exp_avg_name(parameter.name), parameter, parameter.exp_avg);
    load_one(exp_avg_sq_name(parameter.name), parameter, parameter.exp_avg_sq);
  }
  updates_.fill_(static_cast<double>(updates));
}

}  // namespace gateloop::training
