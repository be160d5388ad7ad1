#include "ops/rms_norm.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "ops/autograd/gradients.h"
#include "ops/checks.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In torch's operators. 1e-12 is zero in float16, whose least positive number is 2^-24.
double floor_of(const at::Tensor& x) { return x.scalar_type() == at::kHalf ? 0x1p-24 : 1e-12; }
at::Tensor norm_of(const at::Tensor& x) {
  return at::linalg_vector_norm(x, 2, -1, /*keepdim=*/true);
}
double root_of_dim(const at::Tensor& gamma) {
  return std::sqrt(static_cast<double>(gamma.size(0)));
}

at::Tensor definition(const at::Tensor& x, const at::Tensor& gamma) {
  // √dim joins gamma, which is small, instead of taking a pass of its own over x.
  return x / norm_of(x).clamp_min(floor_of(x)) * (gamma * root_of_dim(gamma));
}

variable_list gradients(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gamma) {
  const at::Tensor norm = norm_of(x), bounded = norm.clamp_min(floor_of(x));
  const at::Tensor unit = x / bounded, dscaled = dy * (gamma * root_of_dim(gamma));
  const at::Tensor along = (unit * dscaled).sum(-1, /*keepdim=*/true) * norm.ge(floor_of(x));
  std::vector<std::int64_t> rows(static_cast<std::size_t>(x.dim() - 1));
  std::iota(rows.begin(), rows.end(), 0);
  const at::Tensor parts = dy * unit * root_of_dim(gamma);
  return {(dscaled - unit * along) / bounded, rows.empty() ? parts : parts.sum(rows)};
}

/// Whether nobody would notice that torch's operators are not called.
bool is_plain(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return is_plain_cpu(t) &&
         std::find(kGateTypes.begin(), kGateTypes.end(), type) != kGateTypes.end() &&
         !t._fw_grad(/*level=*/0).defined();
}

bool has_kernel(const at::Tensor& x, const at::Tensor& gamma) {
  return is_plain(x) && is_plain(gamma) && x.scalar_type() == gamma.scalar_type() &&
         gamma.dim() == 1 && x.dim() > 0 && x.size(-1) == gamma.size(0) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gamma) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, gamma});
    ctx->set_materialize_grads(false);
    return rms_norm_forward(x, gamma);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}};
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &gamma = saved[1], &dy = grads[0];
    // Not the kernel's: a gradient to differentiate again, or a batch of them.
    if (needs_differentiable_backward() || !has_kernel(dy, gamma)) return gradients(dy, x, gamma);
    const auto [dx, dgamma] = rms_norm_backward(dy, x, gamma);
    return {dx, dgamma};
  }
};

at::Tensor route(const at::Tensor& x, const at::Tensor& gamma) {
  if (!has_kernel(x, gamma)) return definition(x, gamma);
  if (any_requires_grad({x, gamma})) return RmsNormFunction::apply(x, gamma);
  return rms_norm_forward(x, gamma);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) { m.def("_rms_norm(Tensor x, Tensor gamma) -> Tensor", route); }

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gamma) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_rms_norm", "")
                             .typed<decltype(rms_norm)>();
  return op.call(x, gamma);
}

}  // namespace gateloop::ops
