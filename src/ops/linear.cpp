#include "ops/linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>

#include "ops/autograd/gradients.h"
#include "ops/checks.h"

// torch's own, in a header that it does not install. Weak: null in a torch without it.
namespace at::native {
[[gnu::weak]] void mkldnn_matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& result,
                                 float beta, float alpha);
}  // namespace at::native

namespace gateloop::ops {
namespace {

constexpr auto kLinear = "gateloop::linear";

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// MKL has AVX-512 kernels for Intel's processors alone. On two cores of a Zen 5 it reaches 215
// GFLOP/s in float32, oneDNN 420 to 500.
bool is_faster_than_mkl() {
  static const bool faster =
      __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && at::native::mkldnn_matmul != nullptr &&
      at::globalContext().hasMKLDNN();
  return faster && at::globalContext().userEnabledMkldnn();
}

/// a (M, K) times b (K, N).
at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  if (is_watched()) return at::mm(a, b);
  at::Tensor result = at::empty({a.size(0), b.size(1)}, a.options());
  at::native::mkldnn_matmul(a.resolve_neg(), b.resolve_neg(), result, /*beta=*/0, /*alpha=*/1);
  return result;
}

/// Of plain numbers: torch's products read them unchecked too. All else has no such memory.
void check_plain_readable(std::initializer_list<NamedTensor> all) {
  for (const auto& [name, t] : all) {
    if (is_given(t) && is_plain_cpu(*t)) check_readable(kLinear, name, *t);
  }
}

at::Tensor as_rows(const at::Tensor& t) { return t.reshape({-1, t.size(-1)}); }

bool is_plain_float(const at::Tensor& t) {
  return is_plain_cpu(t) && t.scalar_type() == at::kFloat && t.numel() > 0;
}

/// Saves x where weight needs a gradient, and weight where x does.
struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias) {
    const bool needs_x = weight.requires_grad(), needs_weight = x.requires_grad();
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({needs_x ? x : at::Tensor(), needs_weight ? weight : at::Tensor()});
    ctx->saved_data["bias_needs_gradient"] = is_given(bias) && bias->requires_grad();
    at::Tensor y = product(as_rows(x), weight.t());
    if (is_given(bias)) y.add_(*bias);
    auto shape = x.sizes().vec();
    shape.back() = weight.size(0);
    return y.view(shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    check_plain_readable({{"the saved x", x}, {"the saved weight", weight}, {"dy", grads[0]}});
    const at::Tensor dy = as_rows(grads[0]);
    const auto times = [](const at::Tensor& a, const at::Tensor& b) {
      const bool served = !needs_pieces_backward({a, b}) && is_plain_float(a) && is_plain_float(b);
      return served ? product(a, b) : at::mm(a, b);
    };
    variable_list result(3);
    if (weight.defined()) {
      auto sizes = grads[0].sizes().vec();
      sizes.back() = weight.size(1);
      result[0] = times(dy, weight).view(sizes);
    }
    if (x.defined()) result[1] = times(dy.t(), as_rows(x));
    if (ctx->saved_data["bias_needs_gradient"].toBool()) result[2] = dy.sum(0);
    return result;
  }
};

// A call of oneDNN takes some 12 us whatever its size, MKL's 1: they are even near 2^20
// multiply-adds.
constexpr std::int64_t kLeastWork = 1 << 20;

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  check_plain_readable({{"x", x}, {"weight", weight}, {"bias", bias}});
  const bool served = is_faster_than_mkl() && !at::autocast::is_autocast_enabled(at::kCPU) &&
                      is_plain_float(x) && is_plain_float(weight) && weight.dim() == 2 &&
                      x.dim() > 0 && x.size(-1) == weight.size(1) &&
                      x.numel() * weight.size(0) >= kLeastWork &&
                      (!is_given(bias) || (is_plain_float(*bias) && bias->dim() == 1)) &&
                      !needs_pieces({x, weight, bias});
  return served ? LinearFunction::apply(x, weight, bias) : at::linear(x, weight, bias);
}

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear,
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gateloop, FuncTorchBatchedDecomposition, m) { m.impl("linear", linear); }

}  // namespace gateloop::ops
