#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <vector>

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/composite/features.h"
#include "ops/cpu/executor.h"
#include "ops/define.h"
#include "ops/internal.h"
#include "ops/masked.h"

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> ops::gate_loop_by_linear_recurrence(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens) {
  // Results have the dtypes of the arguments. Autocast would round the read-out to its own.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool wide = q.dim() == 4;
  const auto real = c10::toRealValueType(a.scalar_type());
  const at::Tensor q_ = q.to(real), k_ = k.to(real), v_ = v.to(real);
  const at::Tensor product = wide ? k_.unsqueeze(-1) * v_.unsqueeze(-2) : k_ * v_;
  const at::Tensor kv = product.to(a.scalar_type());  // (B, T, D) or (B, T, H, K, V)

  if (!wide) {
    const auto [h, final_state] = linear_recurrence(a, kv, initial_state, reverse, cu_seqlens);
    return {(q_ * (h.is_complex() ? at::real(h) : h)).to(q.scalar_type()), final_state};
  }
  const at::Tensor per_key = a.dim() == 4 ? a : a.unsqueeze(-1);
  const at::Tensor per_channel = per_key.unsqueeze(-1).expand_as(kv).flatten(2);
  OptionalTensor initial;
  if (is_given(initial_state)) initial = initial_state->flatten(1);
  const auto [h, final_state] =
      linear_recurrence(per_channel, kv.flatten(2), initial, reverse, cu_seqlens);
  const at::Tensor states = (h.is_complex() ? at::real(h) : h).view_as(kv);
  const at::Tensor y = at::matmul(q_.unsqueeze(-2), states).squeeze(-2);
  const auto sizes = kv.sym_sizes();
  return {y.to(q.scalar_type()),
          final_state.view_symint({final_state.sym_size(0), sizes[2], sizes[3], sizes[4]})};
}

namespace {

using Form = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&,
                                                const ops::OptionalTensor&, bool);

/// A form that takes one sequence a batch entry, on each of those packed.
std::tuple<at::Tensor, at::Tensor> one_by_one(Form* form, const at::Tensor& q, const at::Tensor& k,
                                              const at::Tensor& v, const at::Tensor& a,
                                              const ops::OptionalTensor& initial_state,
                                              bool reverse, const at::Tensor& cu_seqlens) {
  const auto offsets = ops::kernel_offsets("gateloop::gate_loop", cu_seqlens, q.size(1));
  std::vector<at::Tensor> ys = {v.narrow(1, 0, 0)}, states;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    const auto part = [&](const at::Tensor& t) {
      return t.narrow(1, offsets[n], offsets[n + 1] - offsets[n]);
    };
    ops::OptionalTensor initial;
    if (ops::is_given(initial_state)) {
      initial = initial_state->narrow(0, static_cast<std::int64_t>(n), 1);
    }
    auto [y, state] = form(part(q), part(k), part(v), part(a), initial, reverse);
    ys.push_back(y);
    states.push_back(state);
  }
  const at::Tensor none = at::empty({0, q.size(2), q.size(3), v.size(3)}, a.options());
  return {at::cat(ys, 1), states.empty() ? none : at::cat(states, 0)};
}

std::tuple<at::Tensor, at::Tensor> in_form(const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const at::Tensor& a,
                                           const ops::OptionalTensor& initial_state, bool reverse,
                                           const ops::OptionalTensor& cu_seqlens,
                                           const ops::OptionalTensor& mask, c10::string_view form,
                                           c10::string_view feature_map) {
  constexpr auto kOp = "gateloop::gate_loop";
  ops::check_gate_loop(q, k, v, a, initial_state, cu_seqlens,
                       ops::feature_map_of(kOp, feature_map));
  if (ops::is_given(mask)) {
    ops::check_mask(kOp, "q", q, mask, cu_seqlens);
    const ops::Padding padding(*mask);
    const auto [y, final_state] =
        in_form(padding.filled(q), padding.filled(k), padding.filled(v), padding.filled(a, 1),
                initial_state, reverse, {}, {}, form, feature_map);
    return {padding.filled(y), final_state};
  }
  const bool wide = q.dim() == 4;
  if (form == "auto" || form == "scan") {
    return wide
               ? ops::chunked_gate_loop(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map)
               : ops::gate_loop_by_linear_recurrence(q, k, v, a, initial_state, reverse,
                                                     cu_seqlens);
  }
  TORCH_CHECK_VALUE(form == "attention" || form == "recurrent",
                    "gateloop::gate_loop: form must be auto, scan, attention or recurrent, got ",
                    form);
  if (!wide) {
    ops::OptionalTensor initial;
    if (ops::is_given(initial_state)) initial = initial_state->unsqueeze(-1).unsqueeze(-1);
    const auto [y, final_state] = in_form(q.unsqueeze(-1), k.unsqueeze(-1), v.unsqueeze(-1), a,
                                          initial, reverse, cu_seqlens, {}, form, feature_map);
    return {y.squeeze(-1), final_state.squeeze(-1).squeeze(-1)};
  }
  if (feature_map != "none") {
    // In the type of the features; the results are as without a map.
    const at::Tensor wide_q = ops::features(q, feature_map), wide_k = ops::features(k, feature_map);
    const auto [y, final_state] = in_form(wide_q, wide_k, v.to(wide_q.scalar_type()), a,
                                          initial_state, reverse, cu_seqlens, {}, form, "none");
    return {y.to(v.scalar_type()), final_state};
  }
  Form* const chosen = form == "attention" ? ops::attention_gate_loop : ops::gate_loop_by_steps;
  return ops::is_given(cu_seqlens)
             ? one_by_one(chosen, q, k, v, a, initial_state, reverse, *cu_seqlens)
             : chosen(q, k, v, a, initial_state, reverse);
}

std::tuple<at::Tensor, at::Tensor> checked_step(const at::Tensor& q, const at::Tensor& k,
                                                const at::Tensor& v, const at::Tensor& a,
                                                const at::Tensor& state) {
  ops::check_gate_loop_step(q, k, v, a, state);
  if (q.dim() == 3) return ops::gate_loop_step(q, k, v, a, state);
  const auto [y, next] = ops::gate_loop_step(q.unsqueeze(-1), k.unsqueeze(-1), v.unsqueeze(-1), a,
                                             state.unsqueeze(-1).unsqueeze(-1));
  return {y.squeeze(-1), next.squeeze(-1).squeeze(-1)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state=None, bool "
      "reverse=False, Tensor? cu_seqlens=None, Tensor? mask=None, *, str form='auto', str "
      "feature_map='none') -> (Tensor y, Tensor final_state)",
      in_form, {at::Tag::pt2_compliant_tag});
  m.def(
      "gate_loop_step(Tensor q, Tensor k, Tensor v, Tensor a, Tensor state) -> (Tensor y, Tensor "
      "state)",
      checked_step, {at::Tag::pt2_compliant_tag});
  m.def(
      "_attention_gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state, bool "
      "reverse) -> (Tensor y, Tensor final_state)",
      {at::Tag::pt2_compliant_tag});
  ops::define(m,
              "_chunked_gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state, "
              "bool reverse, Tensor? cu_seqlens=None, str feature_map='none') -> (Tensor y, Tensor "
              "final_state)");
  ops::define(
      m,
      "_chunked_gate_loop_forward(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? "
      "initial_state, bool reverse, Tensor? cu_seqlens=None, str feature_map='none') -> (Tensor y, "
      "Tensor final_state, Tensor saved_states)");
  ops::define(m,
              "_chunked_gate_loop_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor k, "
              "Tensor v, Tensor a, Tensor saved_states, bool reverse, Tensor? cu_seqlens=None, str "
              "feature_map='none') -> "
              "(Tensor dq, Tensor dk, Tensor dv, Tensor da, Tensor dinitial_state)");
}

std::tuple<at::Tensor, at::Tensor> gate_loop(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const std::optional<at::Tensor>& initial_state,
                                             bool reverse,
                                             const std::optional<at::Tensor>& cu_seqlens,
                                             const std::optional<at::Tensor>& mask,
                                             c10::string_view form, c10::string_view feature_map) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::gate_loop", "")
                             .typed<decltype(gate_loop)>();
  return op.call(q, k, v, a, initial_state, reverse, cu_seqlens, mask, form, feature_map);
}

std::tuple<at::Tensor, at::Tensor> gate_loop_step(const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& a,
                                                  const at::Tensor& state) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::gate_loop_step", "")
                             .typed<decltype(gate_loop_step)>();
  return op.call(q, k, v, a, state);
}

std::tuple<at::Tensor, at::Tensor> ops::attention_gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_attention_gate_loop", "")
                             .typed<decltype(attention_gate_loop)>();
  return op.call(q, k, v, a, initial_state, reverse);
}

std::tuple<at::Tensor, at::Tensor> ops::chunked_gate_loop(const at::Tensor& q, const at::Tensor& k,
                                                          const at::Tensor& v, const at::Tensor& a,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens,
                                                          c10::string_view feature_map) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_chunked_gate_loop", "")
                             .typed<decltype(chunked_gate_loop)>();
  return op.call(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::chunked_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_chunked_gate_loop_forward", "")
                             .typed<decltype(chunked_gate_loop_forward)>();
  return op.call(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
ops::chunked_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& a, const at::Tensor& saved_states, bool reverse,
                                const OptionalTensor& cu_seqlens, c10::string_view feature_map) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gateloop::_chunked_gate_loop_backward", "")
                             .typed<decltype(chunked_gate_loop_backward)>();
  return op.call(dy, dfinal_state, q, k, v, a, saved_states, reverse, cu_seqlens, feature_map);
}

}  // namespace gateloop
