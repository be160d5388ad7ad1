#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd/gradients.h"
#include "ops/internal.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct RecomputedFunction : torch::autograd::Function<RecomputedFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& a,
                               const OptionalTensor& initial_state, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({q, k, v, a, initial_state.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->set_materialize_grads(false);
    auto [y, final_state] = gate_loop_recomputed(q, k, v, a, initial_state, reverse);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool reverse = ctx->saved_data["reverse"].toBool();
    variable_list result = differentiate(
        [&](const variable_list& in) -> variable_list {
          auto [y, final_state] =
              gate_loop_by_linear_recurrence(in[0], in[1], in[2], in[3], in[4], reverse);
          return {y, final_state};
        },
        ctx->get_saved_variables(), grads);
    result.emplace_back();
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> gate_loop_recomputed_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse) {
  const auto result = RecomputedFunction::apply(q, k, v, a, initial_state, reverse);
  return {result[0], result[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Autograd, m) {
  m.impl("_gate_loop_recomputed", gate_loop_recomputed_autograd);
}

}  // namespace gateloop::ops
