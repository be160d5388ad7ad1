#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "distributed/group.h"
#include "distributed/time_sharded.h"
#include "gateloop/distributed_ops.h"
#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/find.h"
#include "ops/masked.h"

namespace gateloop::distributed {
namespace {

using States = std::tuple<at::Tensor, at::Tensor>;
using Make = std::unique_ptr<LocalRecurrence>;

bool autocasts(const at::Tensor& t) {
  const auto device = t.device().type();
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

/// Under autocast sequences of several precisions are taken to the widest, as by the operators of
/// one process.
Tensors widened(Tensors sequences) {
  if (!autocasts(sequences[0])) return sequences;
  at::ScalarType type = sequences[0].scalar_type();
  for (const auto& t : sequences) type = c10::promoteTypes(type, t.scalar_type());
  for (auto& t : sequences) t = t.to(type);
  return sequences;
}

/// What an operator does after its checks, without a mask.
States sharded(const char* op, Make recurrence, const std::string& group, bool reverse,
               const OptionalTensor& cu_seqlens, const Tensors& sequences,
               const OptionalTensor& initial_state) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const bool state_needs_gradient =
      at::GradMode::is_enabled() && ops::is_given(initial_state) && initial_state->requires_grad();
  const TimeBlock block(op, find_group(op, group), sequences[0], reverse, cu_seqlens,
                        state_needs_gradient);
  return time_sharded(op, std::move(recurrence), block, sequences, initial_state);
}

States checked_linear_recurrence(const at::Tensor& a, const at::Tensor& x, const std::string& group,
                                 const OptionalTensor& initial_state, bool reverse,
                                 const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  constexpr auto kOp = "gateloop::time_sharded_linear_recurrence";
  const Tensors wide = widened({a, x});
  ops::check_linear_recurrence(wide[0], wide[1], initial_state, cu_seqlens, kOp);
  ops::check_mask(kOp, "x", x, mask, cu_seqlens);
  const auto run = [&](const Tensors& in) {
    return sharded(kOp, local_linear_recurrence(reverse), group, reverse, cu_seqlens, in,
                   initial_state);
  };
  if (!ops::is_given(mask)) return run(wide);
  const ops::Padding padding(*mask);
  const auto [h, final_state] = run({padding.filled(wide[0], 1), padding.filled(wide[1])});
  return {padding.filled(h), final_state};
}

States checked_polar_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& z, const std::string& group,
                               const OptionalTensor& initial_state, bool reverse,
                               const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  constexpr auto kOp = "gateloop::time_sharded_polar_gate_loop";
  const Tensors wide = widened({q, k, v, z});
  ops::check_polar_gate_loop(wide[0], wide[1], wide[2], wide[3], initial_state, cu_seqlens, kOp);
  ops::check_mask(kOp, "q", q, mask, cu_seqlens);
  const auto run = [&](const Tensors& in) {
    return sharded(kOp, local_polar_gate_loop(reverse), group, reverse, cu_seqlens, in,
                   initial_state);
  };
  if (!ops::is_given(mask)) return run(wide);
  const ops::Padding padding(*mask);
  const auto [y, final_state] = run({padding.filled(wide[0]), padding.filled(wide[1]),
                                     padding.filled(wide[2]), padding.held(wide[3])});
  return {padding.filled(y), final_state};
}

States checked_simple_gate_loop(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                                const std::string& group, const OptionalTensor& initial_state,
                                bool reverse, bool normalize_input,
                                const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  constexpr auto kOp = "gateloop::time_sharded_simple_gate_loop";
  const Tensors wide = widened({q, kv, z});
  ops::check_simple_gate_loop(wide[0], wide[1], wide[2], initial_state, cu_seqlens, kOp);
  ops::check_mask(kOp, "q", q, mask, cu_seqlens);
  const auto run = [&](const Tensors& in) {
    return sharded(kOp, local_simple_gate_loop(reverse, normalize_input), group, reverse,
                   cu_seqlens, in, initial_state);
  };
  if (!ops::is_given(mask)) return run(wide);
  const ops::Padding padding(*mask);
  const auto [y, final_state] = run({padding.filled(wide[0]), padding.filled(wide[1]),
                                     padding.filled(wide[2], ops::kHoldingGate)});
  return {padding.filled(y), final_state};
}

States checked_gate_loop(const at::Tensor& given_q, const at::Tensor& given_k,
                         const at::Tensor& given_v, const at::Tensor& given_a,
                         const std::string& group, const OptionalTensor& initial_state,
                         bool reverse, const OptionalTensor& cu_seqlens, const OptionalTensor& mask,
                         c10::string_view feature_map) {
  constexpr auto kOp = "gateloop::time_sharded_gate_loop";
  const Tensors wide = widened({given_q, given_k, given_v});
  const at::Tensor &q = wide[0], &k = wide[1], &v = wide[2];
  const at::Tensor a = autocasts(given_q) ? ops::as_wide_as_states(given_a) : given_a;
  ops::check_gate_loop(q, k, v, a, initial_state, cu_seqlens, ops::feature_map_of(kOp, feature_map),
                       kOp);
  ops::check_mask(kOp, "q", q, mask, cu_seqlens);
  if (ops::is_given(mask)) {
    const ops::Padding padding(*mask);
    const auto [y, final_state] =
        checked_gate_loop(padding.filled(q), padding.filled(k), padding.filled(v),
                          padding.filled(a, 1), group, initial_state, reverse, {}, {}, feature_map);
    return {padding.filled(y), final_state};
  }
  if (q.dim() == 4) {
    return sharded(kOp, local_wide_gate_loop(reverse, std::string(feature_map)), group, reverse,
                   cu_seqlens, {q, k, v, a}, initial_state);
  }
  return ops::gate_loop_around(
      [&](const at::Tensor& kv) {
        return sharded(kOp, local_linear_recurrence(reverse), group, reverse, cu_seqlens, {a, kv},
                       initial_state);
      },
      q, k, v, a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def(
      "time_sharded_linear_recurrence(Tensor a, Tensor x, str group, Tensor? initial_state=None, "
      "bool reverse=False, Tensor? cu_seqlens=None, Tensor? mask=None) -> (Tensor h, Tensor "
      "final_state)",
      checked_linear_recurrence);
  m.def(
      "time_sharded_gate_loop(Tensor q, Tensor k, Tensor v, Tensor a, str group, Tensor? "
      "initial_state=None, bool reverse=False, Tensor? cu_seqlens=None, Tensor? mask=None, *, str "
      "feature_map='none') -> (Tensor y, Tensor final_state)",
      checked_gate_loop);
  m.def(
      "time_sharded_polar_gate_loop(Tensor q, Tensor k, Tensor v, Tensor z, str group, Tensor? "
      "initial_state=None, bool reverse=False, Tensor? cu_seqlens=None, Tensor? mask=None) -> "
      "(Tensor y, Tensor final_state)",
      checked_polar_gate_loop);
  m.def(
      "time_sharded_simple_gate_loop(Tensor q, Tensor kv, Tensor z, str group, Tensor? "
      "initial_state=None, bool reverse=False, bool normalize_input=False, Tensor? "
      "cu_seqlens=None, Tensor? mask=None) -> (Tensor y, Tensor final_state)",
      checked_simple_gate_loop);
}

}  // namespace gateloop::distributed

namespace gateloop::time_sharded {

using ops::find;

std::tuple<at::Tensor, at::Tensor> linear_recurrence(const at::Tensor& a, const at::Tensor& x,
                                                     const std::string& group,
                                                     const std::optional<at::Tensor>& initial_state,
                                                     bool reverse,
                                                     const std::optional<at::Tensor>& cu_seqlens,
                                                     const std::optional<at::Tensor>& mask) {
  static const auto op =
      find<decltype(linear_recurrence)>("gateloop::time_sharded_linear_recurrence");
  return op.call(a, x, group, initial_state, reverse, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor> gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const std::string& group, const std::optional<at::Tensor>& initial_state, bool reverse,
    const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& mask,
    c10::string_view feature_map) {
  static const auto op = find<decltype(gate_loop)>("gateloop::time_sharded_gate_loop");
  return op.call(q, k, v, a, group, initial_state, reverse, cu_seqlens, mask, feature_map);
}

std::tuple<at::Tensor, at::Tensor> polar_gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const std::string& group, const std::optional<at::Tensor>& initial_state, bool reverse,
    const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& mask) {
  static const auto op = find<decltype(polar_gate_loop)>("gateloop::time_sharded_polar_gate_loop");
  return op.call(q, k, v, z, group, initial_state, reverse, cu_seqlens, mask);
}

std::tuple<at::Tensor, at::Tensor> simple_gate_loop(const at::Tensor& q, const at::Tensor& kv,
                                                    const at::Tensor& z, const std::string& group,
                                                    const std::optional<at::Tensor>& initial_state,
                                                    bool reverse, bool normalize_input,
                                                    const std::optional<at::Tensor>& cu_seqlens,
                                                    const std::optional<at::Tensor>& mask) {
  static const auto op =
      find<decltype(simple_gate_loop)>("gateloop::time_sharded_simple_gate_loop");
  return op.call(q, kv, z, group, initial_state, reverse, normalize_input, cu_seqlens, mask);
}

}  // namespace gateloop::time_sharded
