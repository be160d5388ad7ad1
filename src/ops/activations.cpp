#include "ops/activations.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/kernels/executor.h"
#include "recurrence/training.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Of a dtype that kernels take, of one shape, and nothing but numbers.
bool are_plain_alike(std::initializer_list<at::Tensor> tensors) {
  const at::Tensor& first = *tensors.begin();
  return std::ranges::find(kRealTypes, first.scalar_type()) != kRealTypes.end() &&
         std::ranges::all_of(tensors,
                             [&](const at::Tensor& t) {
                               return is_plain_cpu(t) && t.scalar_type() == first.scalar_type() &&
                                      t.sizes() == first.sizes();
                             }) &&
         !needs_pieces({first, *(tensors.end() - 1)});
}

at::Tensor empty_as(const at::Tensor& t) { return at::empty(t.sizes(), t.options()); }

struct GeluFunction : torch::autograd::Function<GeluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    const at::Tensor from = contiguous(x);
    at::Tensor y = empty_as(x);
    run_kernel(recurrence::Gelu{.dtype = kernel_dtype(x.scalar_type()),
                                .elements = x.numel(),
                                .x = from.const_data_ptr(),
                                .y = y.mutable_data_ptr()},
               x.device());
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor x = ctx->get_saved_variables()[0];
    if (needs_differentiable_backward()) return {at::gelu_backward(grads[0], x)};
    const at::Tensor from = contiguous(x), dy = contiguous(grads[0]);
    at::Tensor dx = empty_as(x);
    run_kernel(recurrence::GeluBackward{.dtype = kernel_dtype(x.scalar_type()),
                                        .elements = x.numel(),
                                        .x = from.const_data_ptr(),
                                        .dy = dy.const_data_ptr(),
                                        .dx = dx.mutable_data_ptr()},
               x.device());
    return {dx};
  }
};

struct SwishGateFunction : torch::autograd::Function<SwishGateFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& g, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({g, x});
    const at::Tensor gate = contiguous(g), from = contiguous(x);
    at::Tensor y = empty_as(x);
    run_kernel(recurrence::SwishGate{.dtype = kernel_dtype(x.scalar_type()),
                                     .elements = x.numel(),
                                     .g = gate.const_data_ptr(),
                                     .x = from.const_data_ptr(),
                                     .y = y.mutable_data_ptr()},
               x.device());
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &g = saved[0], &x = saved[1];
    if (needs_differentiable_backward()) {
      return differentiate(
          [](const variable_list& in) -> variable_list { return {at::silu(in[0]) * in[1]}; },
          {g, x}, grads);
    }
    const at::Tensor gate = contiguous(g), from = contiguous(x), dy = contiguous(grads[0]);
    at::Tensor dg = empty_as(g), dx = empty_as(x);
    run_kernel(recurrence::SwishGateBackward{.dtype = kernel_dtype(x.scalar_type()),
                                             .elements = x.numel(),
                                             .g = gate.const_data_ptr(),
                                             .x = from.const_data_ptr(),
                                             .dy = dy.const_data_ptr(),
                                             .dg = dg.mutable_data_ptr(),
                                             .dx = dx.mutable_data_ptr()},
               x.device());
    return {dg, dx};
  }
};

}  // namespace

at::Tensor gelu(const at::Tensor& x) {
  return are_plain_alike({x}) ? GeluFunction::apply(x) : at::gelu(x);
}

at::Tensor swish_gate(const at::Tensor& g, const at::Tensor& x) {
  return are_plain_alike({g, x}) ? SwishGateFunction::apply(g, x) : at::silu(g) * x;
}

}  // namespace gateloop::ops
