#include <torch/library.h>

#include <vector>

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/composite/definition.h"
#include "ops/composite/features.h"
#include "ops/find.h"
#include "ops/internal.h"
#include "ops/masked.h"

namespace gateloop {

std::tuple<at::Tensor, at::Tensor> ops::gate_loop_around(
    const std::function<std::tuple<at::Tensor, at::Tensor>(const at::Tensor& kv)>& recurrence,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a) {
  const auto real = c10::toRealValueType(a.scalar_type());
  const auto [h, final_state] = recurrence((k.to(real) * v.to(real)).to(a.scalar_type()));
  return {(q.to(real) * (h.is_complex() ? at::real(h) : h)).to(q.scalar_type()), final_state};
}

std::tuple<at::Tensor, at::Tensor> ops::gate_loop_by_linear_recurrence(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens) {
  return gate_loop_around(
      [&](const at::Tensor& kv) {
        return linear_recurrence(a, kv, initial_state, reverse, cu_seqlens);
      },
      q, k, v, a);
}

namespace {

using Form = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&,
                                                const ops::OptionalTensor&, bool, c10::string_view);

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
    if (!wide)
      return ops::gate_loop_by_linear_recurrence(q, k, v, a, initial_state, reverse, cu_seqlens);
    // Products of matrices of one number take 45 times as long.
    if (q.sym_size(3) == 1 && v.sym_size(3) == 1 && feature_map == "none") {
      ops::OptionalTensor initial;
      if (ops::is_given(initial_state)) initial = initial_state->squeeze(-1).squeeze(-1);
      const auto [y, final_state] = ops::gate_loop_by_linear_recurrence(
          q.squeeze(-1), k.squeeze(-1), v.squeeze(-1), a.dim() == 4 ? a.squeeze(-1) : a, initial,
          reverse, cu_seqlens);
      return {y.unsqueeze(-1), final_state.unsqueeze(-1).unsqueeze(-1)};
    }
    return ops::chunked_gate_loop(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
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
  Form* const chosen = form == "attention" ? ops::attention_gate_loop : ops::gate_loop_by_steps;
  if (!ops::is_given(cu_seqlens)) return chosen(q, k, v, a, initial_state, reverse, feature_map);
  const auto results = ops::compute_whole(
      {.op = "gateloop::gate_loop",
       .compute =
           [&](const std::vector<at::Tensor>& in, const at::Tensor& state,
               const ops::OptionalTensor&) {
             const auto [y, final_state] =
                 chosen(in[0], in[1], in[2], in[3], state, reverse, feature_map);
             return ops::Definition::Results{y, final_state, {}};
           },
       .like = 2,
       .sizes = {q.size(2), ops::state_keys(q, ops::feature_map_of(kOp, feature_map)).expect_int(),
                 v.size(3)},
       .dtype = a.scalar_type()},
      {q, k, v, a}, initial_state, cu_seqlens);
  return {results[0], results[1]};
}

std::tuple<at::Tensor, at::Tensor> checked_step(const at::Tensor& q, const at::Tensor& k,
                                                const at::Tensor& v, const at::Tensor& a,
                                                const at::Tensor& state,
                                                c10::string_view feature_map) {
  ops::check_gate_loop_step(q, k, v, a, state,
                            ops::feature_map_of("gateloop::gate_loop_step", feature_map));
  if (q.dim() == 3) {
    return ops::gate_loop_step(ops::features(q, feature_map), ops::features(k, feature_map), v, a,
                               state);
  }
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
      "gate_loop_step(Tensor q, Tensor k, Tensor v, Tensor a, Tensor state, *, str "
      "feature_map='none') -> (Tensor y, Tensor state)",
      checked_step, {at::Tag::pt2_compliant_tag});
  m.def(
      "_attention_gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state, bool "
      "reverse, str feature_map='none') -> (Tensor y, Tensor final_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_chunked_gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? initial_state, "
      "bool reverse, Tensor? cu_seqlens=None, str feature_map='none') -> (Tensor y, Tensor "
      "final_state)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_chunked_gate_loop_forward(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? "
      "initial_state, bool reverse, Tensor? cu_seqlens=None, str feature_map='none') -> (Tensor y, "
      "Tensor final_state, "
      "Tensor saved_states)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_chunked_gate_loop_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor k, "
      "Tensor v, Tensor a, Tensor saved_states, bool reverse, Tensor? cu_seqlens=None, str "
      "feature_map='none') -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor da, Tensor dinitial_state)",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<at::Tensor, at::Tensor> gate_loop(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const std::optional<at::Tensor>& initial_state,
                                             bool reverse,
                                             const std::optional<at::Tensor>& cu_seqlens,
                                             const std::optional<at::Tensor>& mask,
                                             c10::string_view form, c10::string_view feature_map) {
  static const auto op = ops::find<decltype(gate_loop)>("gateloop::gate_loop");
  return op.call(q, k, v, a, initial_state, reverse, cu_seqlens, mask, form, feature_map);
}

std::tuple<at::Tensor, at::Tensor> gate_loop_step(const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& a,
                                                  const at::Tensor& state,
                                                  c10::string_view feature_map) {
  static const auto op = ops::find<decltype(gate_loop_step)>("gateloop::gate_loop_step");
  return op.call(q, k, v, a, state, feature_map);
}

std::tuple<at::Tensor, at::Tensor> ops::attention_gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, c10::string_view feature_map) {
  static const auto op = ops::find<decltype(attention_gate_loop)>("gateloop::_attention_gate_loop");
  return op.call(q, k, v, a, initial_state, reverse, feature_map);
}

std::tuple<at::Tensor, at::Tensor> ops::chunked_gate_loop(const at::Tensor& q, const at::Tensor& k,
                                                          const at::Tensor& v, const at::Tensor& a,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens,
                                                          c10::string_view feature_map) {
  static const auto op = ops::find<decltype(chunked_gate_loop)>("gateloop::_chunked_gate_loop");
  return op.call(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::chunked_gate_loop_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const OptionalTensor& initial_state, bool reverse, const OptionalTensor& cu_seqlens,
    c10::string_view feature_map) {
  static const auto op =
      ops::find<decltype(chunked_gate_loop_forward)>("gateloop::_chunked_gate_loop_forward");
  return op.call(q, k, v, a, initial_state, reverse, cu_seqlens, feature_map);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
ops::chunked_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& a, const at::Tensor& saved_states, bool reverse,
                                const OptionalTensor& cu_seqlens, c10::string_view feature_map) {
  static const auto op =
      ops::find<decltype(chunked_gate_loop_backward)>("gateloop::_chunked_gate_loop_backward");
  return op.call(dy, dfinal_state, q, k, v, a, saved_states, reverse, cu_seqlens, feature_map);
}

}  // namespace gateloop
