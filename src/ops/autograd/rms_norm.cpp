#include "ops/rms_norm.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/gradients.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gamma) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, gamma});
    ctx->set_materialize_grads(false);
    return rms_norm(x, gamma);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}};
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &gamma = saved[1];
    const auto [dx, dgamma] = needs_differentiable_backward()
                                  ? rms_norm_backward_composite(grads[0], x, gamma)
                                  : rms_norm_backward(grads[0], x, gamma);
    return {dx, dgamma};
  }
};

at::Tensor rms_norm_autograd(const at::Tensor& x, const at::Tensor& gamma) {
  if (needs_pieces({x, gamma})) return rms_norm_composite(x, gamma);
  if (any_requires_grad({x, gamma})) return RmsNormFunction::apply(x, gamma);
  at::AutoDispatchBelowADInplaceOrView guard;
  return rms_norm(x, gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) { m.impl("rms_norm", rms_norm_autograd); }

}  // namespace gateloop::ops
