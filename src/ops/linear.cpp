#include "ops/linear.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "host/weight_memory.h"
#include "ops/checks.h"
#include "ops/linear_row.h"

namespace gateloop::ops {
namespace {

/// torch has no header for oneDNN's products; its own compiler calls them by these names.
auto find(const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}); }

bool has_packed_products(const at::Tensor& weight) {
  static const bool present = find("mkldnn::_linear_pointwise") &&
                              find("mkldnn::_reorder_linear_weight") &&
                              find("mkldnn::_is_mkldnn_bf16_supported");
  if (!present || !at::globalContext().userEnabledMkldnn()) return false;
  if (!is_plain_cpu(weight) || weight.dim() != 2 || weight.numel() == 0) return false;
  if (weight.scalar_type() != at::kBFloat16) return weight.scalar_type() == at::kFloat;
  static const bool bfloat16 = find("mkldnn::_is_mkldnn_bf16_supported")->typed<bool()>().call();
  return bfloat16;
}

at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  // oneDNN's product reads what it gets as the dtype and the shape of the weight.
  constexpr auto op = "gateloop::_linear";
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(
      is_plain_cpu(x) && x.scalar_type() == dtype && x.dim() > 0 && x.size(-1) == weight.size(1),
      op, ": x must be (..., ", weight.size(1), ") of ", dtype, " on the CPU, got ", x.sizes(),
      " of ", x.scalar_type(), " on ", x.device());
  const bool has_bias = bias.has_value() && bias->defined();
  TORCH_CHECK(!has_bias || (is_plain_cpu(*bias) && bias->scalar_type() == dtype &&
                            bias->dim() == 1 && bias->size(0) == weight.size(0)),
              op, ": bias must be (", weight.size(0), ") of ", dtype, " on the CPU, got ",
              has_bias
                  ? c10::str(bias->sizes(), " of ", bias->scalar_type(), " on ", bias->device())
                  : "none");
  using Product = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                             std::string_view, c10::List<std::optional<at::Scalar>>,
                             std::optional<std::string_view>);
  static const auto product = find("mkldnn::_linear_pointwise")->typed<Product>();
  const auto dense_bias = has_bias ? std::optional(bias->contiguous()) : std::nullopt;
  return product.call(x, weight, dense_bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  if (weight.is_mkldnn()) return linear_packed(x, weight, bias);
  return is_linear_row(x, weight, bias) ? linear_row(x, weight, bias) : at::linear(x, weight, bias);
}

at::Tensor packed(const at::Tensor& weight) {
  if (!has_packed_products(weight)) return weight;
  using Reorder = at::Tensor(const at::Tensor&, std::optional<c10::SymInt>);
  static const auto reorder = find("mkldnn::_reorder_linear_weight")->typed<Reorder>();
  // The layout hardly depends on the number of rows; without one it is that of a single row.
  constexpr int kRows = 64;
  return reorder.call(weight.detach(), kRows);
}

void move_to_large_pages(const at::Tensor& weight) {
  constexpr std::size_t kLeast = std::size_t{1} << 20;  // half a large page
  if (!is_plain_cpu(weight) || weight.nbytes() < kLeast) return;
  host::move_to_large_pages(weight.const_data_ptr(), weight.nbytes());
}

// For the Decoder of the Python package.
TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear);
  m.def("_packed(Tensor weight) -> Tensor", packed);
  m.def("_move_to_large_pages(Tensor weight) -> ()", move_to_large_pages);
}

}  // namespace gateloop::ops
