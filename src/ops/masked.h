#pragma once

/// Padding masks: the operators with a mask are those without one on other sequences.
#include <ATen/ATen.h>

#include <tuple>

#include "ops/internal.h"

namespace gateloop::ops {

/// What stands in sequences instead of the steps that a mask (B, T) calls padding.
class Padding {
 public:
  explicit Padding(const at::Tensor& mask) : padding_(mask.logical_not()) {}

  /// `sequence` (B, T, ...) with `value` there; its gradient there is zero.
  at::Tensor filled(const at::Tensor& sequence, const at::Scalar& value = 0) const;
  /// Raw polar transitions (B, T, 2 D) with ones that hold the state.
  at::Tensor held(const at::Tensor& z) const;

 private:
  at::Tensor along(const at::Tensor& sequence) const;
  at::Tensor padding_;
};

/// z there makes a gate hold the state: σ(8192) is 1 in every dtype. As a power of two it also has
/// z / |z| = 1 without rounding, which 10,000 has not. float16 holds it too.
inline constexpr double kHoldingGate = 8192;

/// Each checks all its arguments, the mask too. cu_seqlens is there to be refused beside a mask.
std::tuple<at::Tensor, at::Tensor> linear_recurrence_masked(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const at::Tensor& mask);
std::tuple<at::Tensor, at::Tensor> polar_gate_loop_masked(const at::Tensor& q, const at::Tensor& k,
                                                          const at::Tensor& v, const at::Tensor& z,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens,
                                                          const at::Tensor& mask);
std::tuple<at::Tensor, at::Tensor> simple_gate_loop_masked(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
    const OptionalTensor& initial_state, bool reverse, bool normalize_input,
    const OptionalTensor& cu_seqlens, const at::Tensor& mask);

}  // namespace gateloop::ops
