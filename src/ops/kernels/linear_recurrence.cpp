#include <torch/library.h>

#include "ops/checks.h"
#include "ops/internal.h"
#include "ops/kernels/executor.h"
#include "ops/masked.h"
#include "ops/meta/shapes.h"
#include "ops/offsets.h"

namespace gateloop::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> linear_recurrence_kernel(
    const at::Tensor& a, const at::Tensor& x, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens, const OptionalTensor& mask) {
  if (is_given(mask)) {
    return linear_recurrence_masked(a, x, initial_state, reverse, cu_seqlens, *mask);
  }
  check_linear_recurrence(a, x, initial_state, cu_seqlens);
  const at::Tensor offsets = kernel_offsets("gateloop::linear_recurrence", cu_seqlens, x);
  const at::Tensor a_ = with_contiguous_channels(a);
  const at::Tensor x_ = with_contiguous_channels(x);
  const at::Tensor initial = contiguous(initial_state);
  at::Tensor h = empty_sequence(x.sizes(), x.options());
  at::Tensor final_state = empty_state(x, accumulation_type(x.scalar_type()), cu_seqlens);

  run_kernel(recurrence::LinearRecurrence{.dtype = kernel_dtype(x.scalar_type()),
                                          .shape = kernel_shape(x),
                                          .reverse = reverse,
                                          .a = input(a_),
                                          .x = input(x_),
                                          .initial_state = state_input(initial),
                                          .h = output(h),
                                          .final_state = final_state.mutable_data_ptr(),
                                          .offsets = as_offsets(offsets)},
             x.device());
  return {h, final_state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_recurrence_backward_kernel(
    const OptionalTensor& dh, const OptionalTensor& dfinal_state, const at::Tensor& a,
    const at::Tensor& h, const OptionalTensor& initial_state, bool reverse,
    const OptionalTensor& cu_seqlens) {
  check_linear_recurrence_backward(dh, dfinal_state, a, h, initial_state, cu_seqlens);
  const at::Tensor offsets = kernel_offsets("gateloop::_linear_recurrence_backward", cu_seqlens, h);
  const at::Tensor a_ = with_contiguous_channels(a);
  const at::Tensor h_ = with_contiguous_channels(h);
  const at::Tensor dh_ = with_contiguous_channels(dh);
  const at::Tensor initial = contiguous(initial_state);
  const at::Tensor dfinal = contiguous(dfinal_state);
  at::Tensor da = empty_sequence(h.sizes(), h.options());
  at::Tensor dx = empty_sequence(h.sizes(), h.options());
  at::Tensor dinitial = empty_state(h, accumulation_type(h.scalar_type()), cu_seqlens);

  run_kernel(recurrence::LinearRecurrenceBackward{.dtype = kernel_dtype(h.scalar_type()),
                                                  .shape = kernel_shape(h),
                                                  .reverse = reverse,
                                                  .a = input(a_),
                                                  .h = input(h_),
                                                  .dh = input(dh_),
                                                  .initial_state = state_input(initial),
                                                  .dfinal_state = state_input(dfinal),
                                                  .da = output(da),
                                                  .dx = output(dx),
                                                  .dinitial_state = dinitial.mutable_data_ptr(),
                                                  .offsets = as_offsets(offsets)},
             h.device());
  return {da, dx, dinitial};
}

void register_linear_recurrence(torch::Library& m) {
  m.impl("linear_recurrence", linear_recurrence_kernel);
  m.impl("_linear_recurrence_backward", linear_recurrence_backward_kernel);
}

}  // namespace

GATELOOP_REGISTER_KERNELS(register_linear_recurrence)

}  // namespace gateloop::ops
