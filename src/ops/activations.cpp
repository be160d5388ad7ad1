#include "ops/activations.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/kernels/executor.h"
#include "recurrence/training.h"

namespace gateloop::ops {
namespace {

constexpr auto kGelu = "gateloop::gelu";
constexpr auto kSwishGate = "gateloop::swish_gate";

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Of a dtype that kernels take, of one shape, and nothing but numbers.
bool are_plain_alike(std::initializer_list<at::Tensor> tensors) {
  const at::Tensor& first = *tensors.begin();
  return std::ranges::find(kRealTypes, first.scalar_type()) != kRealTypes.end() &&
         std::ranges::all_of(tensors, [&](const at::Tensor& t) {
           return is_plain_cpu(t) && t.scalar_type() == first.scalar_type() &&
                  t.sizes() == first.sizes() && !needs_pieces({t});
         });
}

bool is_served_backward(std::initializer_list<at::Tensor> tensors) {
  return !needs_pieces_backward(tensors) && are_plain_alike(tensors);
}

at::Tensor empty_as(const at::Tensor& t) { return at::empty(t.sizes(), t.options()); }

struct GeluFunction : torch::autograd::Function<GeluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    if (is_watched()) return at::gelu(x);
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
    if (!is_served_backward({x, grads[0]})) return {at::gelu_backward(grads[0], x)};
    check_all_readable(kGelu, {{"x", x}, {"dy", grads[0]}});
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
    if (is_watched()) return at::silu(g) * x;
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
    if (!is_served_backward({g, x, grads[0]})) {
      const at::Tensor s = g.sigmoid(), swish = g * s;
      return {(s + swish * (1 - s)) * x * grads[0], swish * grads[0]};
    }
    check_all_readable(kSwishGate, {{"g", g}, {"x", x}, {"dy", grads[0]}});
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
  if (!are_plain_alike({x})) return at::gelu(x);
  check_readable(kGelu, "x", x);
  return GeluFunction::apply(x);
}

at::Tensor swish_gate(const at::Tensor& g, const at::Tensor& x) {
  if (!are_plain_alike({g, x})) return at::silu(g) * x;
  check_all_readable(kSwishGate, {{"g", g}, {"x", x}});
  return SwishGateFunction::apply(g, x);
}

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("gelu(Tensor x) -> Tensor", gelu, {at::Tag::pt2_compliant_tag});
  m.def("swish_gate(Tensor g, Tensor x) -> Tensor", swish_gate, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gateloop, FuncTorchBatchedDecomposition, m) {
  m.impl("gelu", gelu);
  m.impl("swish_gate", swish_gate);
}

}  // namespace gateloop::ops
