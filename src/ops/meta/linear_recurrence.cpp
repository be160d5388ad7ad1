#include <torch/library.h>

#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/masked.h"
#include "ops/meta/shapes.h"

namespace gateloop::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> linear_recurrence_meta(const at::Tensor& a, const at::Tensor& x,
                                                          const OptionalTensor& initial_state,
                                                          bool reverse,
                                                          const OptionalTensor& cu_seqlens,
                                                          const OptionalTensor& mask) {
  if (is_given(mask)) {
    return linear_recurrence_masked(a, x, initial_state, reverse, cu_seqlens, *mask);
  }
  check_linear_recurrence(a, x, initial_state, cu_seqlens);
  return {empty_sequence(x), empty_state(x, accumulation_type(x.scalar_type()), cu_seqlens)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_recurrence_backward_meta(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool /*reverse*/,
    const OptionalTensor& cu_seqlens) {
  check_linear_recurrence_backward(dh, dfinal_state, a, h, initial_state, cu_seqlens);
  return {empty_sequence(h), empty_sequence(h),
          empty_state(h, accumulation_type(h.scalar_type()), cu_seqlens)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, Meta, m) {
  m.impl("linear_recurrence", linear_recurrence_meta);
  m.impl("_linear_recurrence_backward", linear_recurrence_backward_meta);
}

}  // namespace gateloop::ops
