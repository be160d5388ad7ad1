#include "ops/autograd/gradients.h"

#include <ATen/functorch/DynamicLayer.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "ops/checks.h"

namespace gateloop::ops {

using torch::autograd::variable_list;

bool any_requires_grad(std::initializer_list<OptionalTensor> inputs) {
  return at::GradMode::is_enabled() &&
         std::any_of(inputs.begin(), inputs.end(),
                     [](const OptionalTensor& t) { return is_given(t) && t->requires_grad(); });
}

bool any_has_tangent(std::initializer_list<OptionalTensor> inputs) {
  return std::any_of(inputs.begin(), inputs.end(), [](const OptionalTensor& t) {
    return is_given(t) && t->_fw_grad(/*level=*/0).defined();
  });
}

bool needs_pieces_backward(std::initializer_list<at::Tensor> tensors) {
  return needs_differentiable_backward() || is_watched() ||
         std::ranges::any_of(tensors, [](const at::Tensor& t) {
           return t.defined() && (!is_plain_cpu(t) || any_has_tangent({t}));
         });
}

bool is_differentiated() {
  return std::ranges::any_of(at::functorch::getDynamicLayerStack(), [](const auto& layer) {
    return layer.key() != at::functorch::TransformType::Vmap;
  });
}

bool needs_pieces(std::initializer_list<OptionalTensor> inputs) {
  const bool transformed = at::functorch::maybeCurrentDynamicLayer().has_value();
  return any_has_tangent(inputs) || (transformed && any_requires_grad(inputs));
}

variable_list differentiate(const std::function<variable_list(const variable_list&)>& definition,
                            const variable_list& inputs, const variable_list& grad_outputs) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode record(true);
  // One input may be computed from another, or be the same tensor. By an alias of its own each
  // receives its own part alone. Otherwise it would also receive what flows through the others.
  variable_list aliases, used_outputs, used_grads, wanted;
  for (const auto& input : inputs) {
    const bool needed = input.defined() && input.requires_grad();
    aliases.push_back(needed ? input.view_as(input) : input);
    if (needed) wanted.push_back(aliases.back());
  }
  const variable_list outputs = definition(aliases);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    // An output of no steps is computed from no input.
    if (!grad_outputs[i].defined() || !outputs[i].defined() || !outputs[i].requires_grad())
      continue;
    used_outputs.push_back(outputs[i]);
    used_grads.push_back(grad_outputs[i]);
  }
  variable_list gradients(inputs.size());
  if (used_outputs.empty() || wanted.empty()) return gradients;
  const variable_list found =
      torch::autograd::grad(used_outputs, wanted, used_grads, /*retain_graph=*/create_graph,
                            create_graph, /*allow_unused=*/true);
  std::size_t next = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].defined() && inputs[i].requires_grad()) gradients[i] = found[next++];
  }
  return gradients;
}

}  // namespace gateloop::ops
