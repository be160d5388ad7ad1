#include "ops/linear_row.h"

#include <ATen/autocast_mode.h>

#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/cpu/executor.h"

namespace gateloop::ops {

bool is_linear_row(const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias) {
  const auto dtype = x.scalar_type();
  const auto is_read_in_place = [&](const at::Tensor& t) {
    return is_plain_cpu(t) && t.is_contiguous() && t.scalar_type() == dtype;
  };
  const bool has_bias = bias.has_value() && bias->defined();
  return !at::GradMode::is_enabled() && !at::autocast::is_autocast_enabled(at::kCPU) &&
         at::isFloatingType(dtype) && is_read_in_place(x) && is_read_in_place(weight) &&
         (!has_bias || is_read_in_place(*bias)) && x.dim() > 0 && weight.dim() == 2 &&
         x.numel() == weight.size(1) && x.size(-1) == weight.size(1) &&
         (!has_bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)));
}

at::Tensor linear_row(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias) {
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  const at::Tensor wide = x.to(accumulation_type(x.scalar_type()));
  recurrence::MatrixVector product;
  product.dtype = kernel_dtype(x.scalar_type());
  product.rows = weight.size(0);
  product.columns = weight.size(1);
  product.matrix = weight.const_data_ptr();
  product.x = wide.const_data_ptr();
  if (bias.has_value() && bias->defined()) product.bias = bias->const_data_ptr();
  product.y = y.mutable_data_ptr();
  run_kernel(product);
  return y;
}

}  // namespace gateloop::ops
