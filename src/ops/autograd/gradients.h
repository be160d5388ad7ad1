#pragma once

/// What the autograd kernels share.
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <initializer_list>

#include "ops/internal.h"

namespace gateloop::ops {

/// Whether a backward pass may follow.
bool any_requires_grad(std::initializer_list<OptionalTensor> inputs);

/// Whether one of them carries a tangent of forward mode.
bool any_has_tangent(std::initializer_list<OptionalTensor> inputs);

/// Whether a transform of torch.func is active that differentiates: any but vmap.
bool is_differentiated();

/// Whether derivatives have to be those of the pieces of an operator's definition: a
/// torch::autograd::Function has no forward derivatives, nor a place under torch.func's transforms.
bool needs_pieces(std::initializer_list<OptionalTensor> inputs);

/// Under create_graph the fused backward, which records no graph, gives way to differentiating the
/// operator's definition.
inline bool needs_differentiable_backward() { return at::GradMode::is_enabled(); }

/// Whether a backward pass over `tensors`, some undefined, cannot be a kernel's: under
/// create_graph, under a mode of Python's, and where gradients are wrapped for torch.func. Also
/// where hooks save others than plain numbers. The dtypes, which hooks may change too, are the
/// caller's to check.
bool needs_pieces_backward(std::initializer_list<at::Tensor> tensors);

/// Partial gradients of definition(inputs) with respect to `inputs`, with a graph under
/// create_graph; undefined where an input needs none. Undefined grad_outputs count as zeros.
torch::autograd::variable_list differentiate(
    const std::function<torch::autograd::variable_list(const torch::autograd::variable_list&)>&
        definition,
    const torch::autograd::variable_list& inputs,
    const torch::autograd::variable_list& grad_outputs);

}  // namespace gateloop::ops
