#include "ops/rms_norm.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/autograd/gradients.h"
#include "ops/checks.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- in torch's operators: for every tensor, symbolic sizes too

at::ScalarType wide(const at::Tensor& x) { return accumulation_type(x.scalar_type()); }
// 1e-12 is zero in float16, whose least positive number is 2^-24.
double floor_of(const at::Tensor& x) { return x.scalar_type() == at::kHalf ? 0x1p-24 : 1e-12; }
at::Tensor norm_of(const at::Tensor& x) {
  return at::linalg_vector_norm(x, 2, -1, /*keepdim=*/true, wide(x));
}
c10::SymFloat root_of_dim(const at::Tensor& gamma) {
  return c10::SymFloat(gamma.sym_size(0)).sqrt();
}
// √dim joins gamma, which is small, instead of taking a pass of its own over x.
at::Tensor gain_of(const at::Tensor& gamma) { return gamma.to(wide(gamma)) * root_of_dim(gamma); }

at::Tensor definition(const at::Tensor& x, const at::Tensor& gamma) {
  const at::Tensor y = x / norm_of(x).clamp_min(floor_of(x)) * gain_of(gamma);
  return y.to(at::result_type(x, gamma));
}

/// Differentiable in turn.
variable_list gradients(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gamma) {
  const at::Tensor norm = norm_of(x), bounded = norm.clamp_min(floor_of(x));
  const at::Tensor unit = x / bounded, dscaled = dy * gain_of(gamma);
  const at::Tensor along = (unit * dscaled).sum(-1, /*keepdim=*/true) * norm.ge(floor_of(x));
  const at::Tensor dx = (dscaled - unit * along) / bounded;
  const at::Tensor parts = dy * unit * root_of_dim(gamma);
  const at::Tensor dgamma = at::sum_to(parts, gamma.sym_sizes());
  return {dx.to(x.scalar_type()), dgamma.to(gamma.scalar_type())};
}

// ---- and by the kernel

/// Whether nobody would notice that torch's operators are not called.
bool is_plain(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return is_plain_cpu(t) && std::ranges::find(kRealTypes, type) != kRealTypes.end() &&
         !t._fw_grad(/*level=*/0).defined();
}

/// `x` may also be a gradient of the output.
bool has_kernel(const at::Tensor& x, const at::Tensor& gamma) {
  return is_plain(x) && is_plain(gamma) && x.scalar_type() == gamma.scalar_type() &&
         gamma.dim() == 1 && x.dim() > 0 && x.size(-1) == gamma.size(0);
}

/// A dispatch mode, a tracer or a counter, sees what goes through the dispatcher.
bool is_watched() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

at::Tensor forward_of(const at::Tensor& x, const at::Tensor& gamma) {
  return is_watched() ? definition(x, gamma) : rms_norm_forward(x, gamma);
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  // Saves the same watched or not: a checkpoint may watch one of its two passes.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& gamma) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, gamma});
    ctx->set_materialize_grads(false);
    return forward_of(x, gamma);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}};
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &gamma = saved[1], &dy = grads[0];
    // Not the kernel's: a gradient to differentiate again, a batch of them, an x that came back
    // from a hook as another.
    if (needs_differentiable_backward() || is_watched() || !has_kernel(x, gamma) ||
        !has_kernel(dy, gamma)) {
      return gradients(dy, x, gamma);
    }
    const auto [dx, dgamma] = rms_norm_backward(dy, x, gamma);
    return {dx, dgamma};
  }
};

at::Tensor route(const at::Tensor& x, const at::Tensor& gamma) {
  if (!has_kernel(x, gamma)) return definition(x, gamma);
  if (any_requires_grad({x, gamma})) return RmsNormFunction::apply(x, gamma);
  return forward_of(x, gamma);
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
