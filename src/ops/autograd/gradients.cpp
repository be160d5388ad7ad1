#include "ops/autograd/gradients.h"

#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

namespace gateloop::ops {

using torch::autograd::variable_list;

bool any_requires_grad(std::initializer_list<at::Tensor> inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(),
                     [](const at::Tensor& t) { return t.defined() && t.requires_grad(); });
}

variable_list differentiate(const variable_list& outputs, const variable_list& inputs,
                            const variable_list& grad_outputs) {
  variable_list used_outputs, used_grads, wanted;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (!grad_outputs[i].defined()) continue;
    used_outputs.push_back(outputs[i]);
    used_grads.push_back(grad_outputs[i]);
  }
  for (const auto& input : inputs) {
    if (input.defined() && input.requires_grad()) wanted.push_back(input);
  }
  variable_list gradients(inputs.size());
  if (used_outputs.empty() || wanted.empty()) return gradients;
  const variable_list found =
      torch::autograd::grad(used_outputs, wanted, used_grads, /*retain_graph=*/true,
                            /*create_graph=*/true, /*allow_unused=*/true);
  std::size_t next = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].defined() && inputs[i].requires_grad()) gradients[i] = found[next++];
  }
  return gradients;
}

}  // namespace gateloop::ops
