#pragma once

/// The checks at the operators' door. Each names the op, the argument, what was expected and what
/// came. They read symbolic sizes, so the CPU and Meta kernels share them.
#include <ATen/ATen.h>

#include <initializer_list>
#include <optional>

namespace gateloop::ops {

/// Type of states and accumulations: float32 for bfloat16 and float16, else the type itself.
at::ScalarType accumulation_type(at::ScalarType storage);

/// A tensor that is nothing but its numbers: no subclass, no wrapper of torch.func, no zeros
/// without memory.
inline bool is_plain_cpu(const at::Tensor& t) {
  using enum c10::DispatchKey;
  return t.is_cpu() && t.has_storage() &&
         !t.key_set().has_any(c10::DispatchKeySet({Python, Functionalize, ZeroTensor}));
}

/// `t` is (B, T, D) in one of `dtypes`.
void check_sequence(const char* op, const char* name, const at::Tensor& t,
                    std::initializer_list<at::ScalarType> dtypes);

/// `t` has the sizes of `like` with the channels `channel_factor` times as many, its dtype and its
/// device.
void check_matches(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                   const at::Tensor& like, std::int64_t channel_factor = 1);

/// `state` is (B, D) of `sequence` in `dtype`, or absent.
void check_state(const char* op, const char* name, const std::optional<at::Tensor>& state,
                 const at::Tensor& sequence, at::ScalarType dtype);

inline constexpr std::initializer_list<at::ScalarType> kRecurrenceTypes = {
    at::kFloat, at::kDouble, at::kComplexFloat, at::kComplexDouble, at::kBFloat16, at::kHalf};
inline constexpr std::initializer_list<at::ScalarType> kRealTypes = {at::kFloat, at::kDouble,
                                                                     at::kBFloat16, at::kHalf};

/// All the checks of one operator's inputs.
void check_linear_recurrence(const at::Tensor& a, const at::Tensor& x,
                             const std::optional<at::Tensor>& initial_state);
void check_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& z, const std::optional<at::Tensor>& initial_state);
void check_simple_gate_loop(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                            const std::optional<at::Tensor>& initial_state);

}  // namespace gateloop::ops
