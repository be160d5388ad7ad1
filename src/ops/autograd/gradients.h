#pragma once

/// What the autograd kernels share.
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <initializer_list>

namespace gateloop::ops {

/// Whether autograd will ask for a backward pass. Undefined tensors ask for nothing.
bool any_requires_grad(std::initializer_list<at::Tensor> inputs);

/// Under create_graph the fused backward, which records no graph, gives way to differentiating the
/// operator's definition.
inline bool needs_differentiable_backward() { return at::GradMode::is_enabled(); }

/// Partial gradients of definition(inputs) with respect to `inputs`, with a graph under
/// create_graph; undefined where an input needs none. Undefined grad_outputs count as zeros.
torch::autograd::variable_list differentiate(
    const std::function<torch::autograd::variable_list(const torch::autograd::variable_list&)>&
        definition,
    const torch::autograd::variable_list& inputs,
    const torch::autograd::variable_list& grad_outputs);

}  // namespace gateloop::ops
