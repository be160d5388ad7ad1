#include "nn/scans.h"

#include "gateloop/distributed_ops.h"
#include "gateloop/ops.h"

namespace gateloop::nn {

using torch::Tensor;

Scans::Result Scans::linear_recurrence(const Tensor& a, const Tensor& x) const {
  const auto& [cu_seqlens, mask, group] = packing_;
  return sharded() ? time_sharded::linear_recurrence(a, x, group, initial_state_, reverse_,
                                                     cu_seqlens, mask)
                   : gateloop::linear_recurrence(a, x, initial_state_, reverse_, cu_seqlens, mask);
}

Scans::Result Scans::gate_loop(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a,
                               c10::string_view feature_map) const {
  const auto& [cu_seqlens, mask, group] = packing_;
  return sharded() ? time_sharded::gate_loop(q, k, v, a, group, initial_state_, reverse_,
                                             cu_seqlens, mask, feature_map)
                   : gateloop::gate_loop(q, k, v, a, initial_state_, reverse_, cu_seqlens, mask,
                                         "auto", feature_map);
}

Scans::Result Scans::polar_gate_loop(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& z) const {
  const auto& [cu_seqlens, mask, group] = packing_;
  return sharded()
             ? time_sharded::polar_gate_loop(q, k, v, z, group, initial_state_, reverse_,
                                             cu_seqlens, mask)
             : gateloop::polar_gate_loop(q, k, v, z, initial_state_, reverse_, cu_seqlens, mask);
}

Scans::Result Scans::simple_gate_loop(const Tensor& q, const Tensor& kv, const Tensor& z,
                                      bool normalize_input) const {
  const auto& [cu_seqlens, mask, group] = packing_;
  return sharded() ? time_sharded::simple_gate_loop(q, kv, z, group, initial_state_, reverse_,
                                                    normalize_input, cu_seqlens, mask)
                   : gateloop::simple_gate_loop(q, kv, z, initial_state_, reverse_, normalize_input,
                                                cu_seqlens, mask);
}

}  // namespace gateloop::nn
