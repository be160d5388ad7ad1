#pragma once

#include <torch/torch.h>

#include <functional>

namespace gateloop::nn {

using TensorFunction =
    std::function<torch::autograd::variable_list(const torch::autograd::variable_list& inputs)>;

/// run(inputs), of which only the inputs are kept. The backward pass runs it again, under the
/// autocast of this call (Chen et al. 2016, arXiv 1604.06174). So it has the memory of that graph
/// alone. Both passes must compute the same. The results take part in a gradient.
///
/// That pass accumulates the gradients of all other leaves that `run` reads: backward() without
/// `inputs` has them. torch::autograd::grad and second derivatives throw c10::NotImplementedError.
torch::autograd::variable_list recomputed_backward(TensorFunction run,
                                                   const torch::autograd::variable_list& inputs);

}  // namespace gateloop::nn
