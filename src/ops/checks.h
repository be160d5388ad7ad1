#pragma once

/// The checks of the operators' arguments. Each error names the operator, the argument, what was
/// expected and what came. The sizes may be symbolic: CPU and Meta kernels share the checks.
#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <initializer_list>
#include <optional>

#include "gateloop/recurrence.h"
#include "ops/internal.h"

namespace gateloop::ops {

inline constexpr std::initializer_list<at::ScalarType> kRecurrenceTypes = {
    at::kFloat, at::kDouble, at::kComplexFloat, at::kComplexDouble, at::kBFloat16, at::kHalf};
inline constexpr std::initializer_list<at::ScalarType> kRealTypes = {at::kFloat, at::kDouble,
                                                                     at::kBFloat16, at::kHalf};

/// Type of states and accumulations: float32 for bfloat16 and float16, else the type itself, which
/// is one of kRecurrenceTypes.
at::ScalarType accumulation_type(at::ScalarType storage);

/// Type of complex states beside real sequences: complex64 or complex128.
inline at::ScalarType complex_accumulation_type(at::ScalarType storage) {
  return at::toComplexType(accumulation_type(storage));
}

/// A tensor that is nothing but its numbers: no subclass, no wrapper of torch.func, no list of
/// tensors, no zeros without memory.
inline bool is_plain_cpu(const at::Tensor& t) {
  using enum c10::DispatchKey;
  return t.is_cpu() && t.has_storage() && !t.is_nested() &&
         !t.key_set().has_any(c10::DispatchKeySet({Python, Functionalize, ZeroTensor}));
}

/// Whether a mode of Python's intercepts torch's operators, which it cannot do in a kernel. What is
/// saved for a backward pass must not depend on it: a mode may cover one pass of
/// torch.utils.checkpoint alone.
inline bool is_watched() { return c10::impl::TorchDispatchModeTLS::any_modes_set(); }

/// `t` is there, dense, and all its elements lie in its storage: a storage may be resized to less.
void check_readable(const char* op, const char* name, const at::Tensor& t);
struct NamedTensor {
  const char* name;
  const OptionalTensor& tensor;
};
/// Of those that are given.
void check_all_readable(const char* op, std::initializer_list<NamedTensor> all);

/// Of arguments of `op` beside `sequence`, (B, T, ...), which it calls `name`; they may be absent.
/// cu_seqlens packs N sequences along the time of a batch of one: (N + 1) int32 or int64 on the
/// CPU. Its values are checked by those who read them.
void check_cu_seqlens(const char* op, const char* name, const at::Tensor& sequence,
                      const OptionalTensor& cu_seqlens);
/// mask says which steps are no padding: (B, T) bool, without cu_seqlens.
void check_mask(const char* op, const char* name, const at::Tensor& sequence,
                const OptionalTensor& mask, const OptionalTensor& cu_seqlens);

/// "none" or "taylor".
recurrence::FeatureMap feature_map_of(const char* op, c10::string_view name);
/// Keys of a wide head's state, whose queries are q (..., K).
c10::SymInt state_keys(const at::Tensor& q, recurrence::FeatureMap map);

/// All that one operator reads, but the mask. `op`: its name, or that of another that reads the
/// same.
void check_linear_recurrence(const at::Tensor& a, const at::Tensor& x,
                             const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                             const char* op = "gateloop::linear_recurrence");
void check_linear_recurrence_backward(const OptionalTensor& dh, const OptionalTensor& dfinal_state,
                                      const at::Tensor& a, const at::Tensor& h,
                                      const OptionalTensor& initial_state,
                                      const OptionalTensor& cu_seqlens);
void check_polar_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& z, const OptionalTensor& initial_state,
                           const OptionalTensor& cu_seqlens,
                           const char* op = "gateloop::polar_gate_loop");
void check_polar_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const at::Tensor& z, const at::Tensor& saved_states,
                                    const OptionalTensor& cu_seqlens);
void check_simple_gate_loop(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                            const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                            const char* op = "gateloop::simple_gate_loop");
void check_simple_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                     const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                                     const at::Tensor& saved_states,
                                     const OptionalTensor& cu_seqlens);
void check_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& a, const OptionalTensor& initial_state,
                     const OptionalTensor& cu_seqlens, recurrence::FeatureMap map,
                     const char* op = "gateloop::gate_loop");
/// Of a sequence (B, T, ...): B, or N beside cu_seqlens (N + 1).
c10::SymInt state_count(const at::Tensor& sequence, const OptionalTensor& cu_seqlens);
/// Blocks of a sequence (B, T, ...), see saved_state_count() and gate_loop_chunks() of the kernels.
c10::SymInt saved_count(const at::Tensor& sequence, std::int64_t block,
                        const OptionalTensor& cu_seqlens);
c10::SymInt saved_chunk_count(const at::Tensor& a, const OptionalTensor& cu_seqlens);
void check_gate_loop_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& a, const at::Tensor& state, recurrence::FeatureMap map);
inline constexpr auto kChunkedGateLoop = "gateloop::_chunked_gate_loop";
/// Of wide heads, by the name of the operator; their memory too.
void check_wide_gate_loop(const char* op, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v, const at::Tensor& a,
                          const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                          recurrence::FeatureMap map);
void check_chunked_gate_loop_backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                                      const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const at::Tensor& a, const at::Tensor& saved_states,
                                      const OptionalTensor& cu_seqlens, recurrence::FeatureMap map);

}  // namespace gateloop::ops
