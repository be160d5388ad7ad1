#include "nn/wide_heads.h"

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"

namespace gateloop::nn {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::pair<Tensor, Tensor> read(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a,
                               const std::optional<Tensor>& initial_state) {
  // Autocast belongs to the thread: without this the recomputation could run in another precision
  // than the forward pass it repeats.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto real = c10::toRealValueType(a.scalar_type());

  const auto kv = (k.to(real).unsqueeze(-1) * v.to(real).unsqueeze(-2)).to(a.scalar_type());
  const auto a_per_channel = a.unsqueeze(-1).unsqueeze(-1).expand_as(kv).flatten(2);
  std::optional<Tensor> initial;
  if (initial_state) initial = initial_state->flatten(1);
  const auto [h, final_state] = linear_recurrence(a_per_channel, kv.flatten(2), initial);

  const auto states = (h.is_complex() ? at::real(h) : h).view_as(kv);
  const auto y = at::matmul(q.to(real).unsqueeze(-2), states).squeeze(-2);
  return {y, final_state.view({a.size(0), a.size(2), k.size(3), v.size(3)})};
}

/// Keeps the inputs only and runs `read` once more for the gradient, with a graph where the
/// gradient is to be differentiated in turn.
class Recomputed : public torch::autograd::Function<Recomputed> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& a,
                               const std::optional<Tensor>& initial_state) {
    ctx->save_for_backward({q, k, v, a, initial_state.value_or(Tensor())});
    auto [y, final_state] = read(q, k, v, a, initial_state);
    ctx->mark_non_differentiable({final_state});
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto definition = [](const variable_list& in) -> variable_list {
      const auto initial = in[4].defined() ? std::optional<Tensor>(in[4]) : std::nullopt;
      return {read(in[0], in[1], in[2], in[3], initial).first};
    };
    if (ops::needs_differentiable_backward())
      return ops::differentiate(definition, saved, {grads[0]});

    variable_list inputs, wanted;
    for (const auto& input : saved) {
      const bool needed = input.defined() && input.requires_grad();
      inputs.push_back(needed ? input.detach().requires_grad_() : input);
      if (needed) wanted.push_back(inputs.back());
    }
    const at::AutoGradMode enable_grad(true);
    const auto found = torch::autograd::grad(definition(inputs), wanted, {grads[0]});
    variable_list gradients(saved.size());
    for (std::size_t i = 0, next = 0; i < saved.size(); ++i) {
      if (inputs[i].defined() && inputs[i].requires_grad()) gradients[i] = found[next++];
    }
    return gradients;
  }
};

}  // namespace

std::pair<Tensor, Tensor> wide_heads_read(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& a,
                                          const std::optional<Tensor>& initial_state,
                                          bool recompute) {
  if (recompute && at::GradMode::is_enabled()) {
    const auto out = Recomputed::apply(q, k, v, a, initial_state);
    return {out[0], out[1].detach()};
  }
  const auto [y, final_state] = read(q, k, v, a, initial_state);
  return {y, final_state.detach()};
}

}  // namespace gateloop::nn
