#include "ops/residual_norm.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/kernels/executor.h"
#include "ops/rms_norm.h"
#include "recurrence/training.h"

namespace gateloop::ops {
namespace {

using recurrence::Norm;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The operator that has such operands.
const char* name_of(const at::Tensor& bias) {
  return bias.defined() ? "gateloop::add_then_layer_norm" : "gateloop::add_then_rms_norm";
}

void* data_of(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
const void* numbers_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

/// norm(sum), in the dtype `narrow` where one is given; of LayerNorm, where that is another, also
/// before it is rounded.
variable_list norm_of(const at::Tensor& sum, const at::Tensor& gain, const at::Tensor& bias,
                      std::optional<at::ScalarType> narrow) {
  const bool is_rms = !bias.defined();
  const at::Tensor wide =
      is_rms ? rms_norm(sum, gain)
             : at::layer_norm_symint(sum, gain.sym_sizes(), gain, bias, /*eps=*/1e-5);
  if (narrow.value_or(wide.scalar_type()) == wide.scalar_type()) return {wide};
  return is_rms ? variable_list{wide.to(*narrow)} : variable_list{wide.to(*narrow), wide};
}

/// Results: normalised; sum where there is y; normalised_wide of a LayerNorm that is rounded.
struct ResidualNormFunction : torch::autograd::Function<ResidualNormFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const OptionalTensor& added, const at::Tensor& gain,
                               const OptionalTensor& shift, at::ScalarType narrow) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor y = added.value_or(at::Tensor()), bias = shift.value_or(at::Tensor());
    ctx->saved_data["narrow"] = static_cast<std::int64_t>(narrow);
    ctx->saved_data["has_y"] = y.defined();
    ctx->set_materialize_grads(false);
    if (is_watched()) {
      const at::Tensor sum = y.defined() ? x + y : x;
      ctx->save_for_backward({sum, gain, bias});
      variable_list results = norm_of(sum, gain, bias, narrow);
      if (y.defined()) results.insert(results.begin() + 1, sum);
      return results;
    }
    const at::Tensor x_ = contiguous(x), y_ = contiguous(y), gain_ = contiguous(gain),
                     bias_ = contiguous(bias);
    const auto empty = [&](at::ScalarType dtype) {
      return at::empty(x.sizes(), x.options().dtype(dtype));
    };
    variable_list results = {empty(narrow)};
    if (y.defined()) results.push_back(empty(x.scalar_type()));
    const at::Tensor sum = y.defined() ? results[1] : x;
    const bool has_wide = bias.defined() && narrow != x.scalar_type();
    if (has_wide) results.push_back(empty(x.scalar_type()));
    run_kernel(recurrence::ResidualNorm{.dtype = kernel_dtype(narrow),
                                        .norm = bias.defined() ? Norm::kLayer : Norm::kRms,
                                        .rows = x.numel() / gain.numel(),
                                        .columns = gain.numel(),
                                        .x = x_.const_data_ptr(),
                                        .y = numbers_of(y_),
                                        .gain = gain_.const_data_ptr(),
                                        .bias = numbers_of(bias_),
                                        .sum = y.defined() ? sum.mutable_data_ptr() : nullptr,
                                        .normalised = results[0].mutable_data_ptr(),
                                        .normalised_wide =
                                            has_wide ? results.back().mutable_data_ptr() : nullptr},
               x.device());
    ctx->save_for_backward({sum, gain, bias});
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &sum = saved[0], &gain = saved[1], &bias = saved[2];
    const auto narrow = static_cast<at::ScalarType>(ctx->saved_data["narrow"].toInt());
    const bool has_y = ctx->saved_data["has_y"].toBool();
    const at::Tensor& dnormalised = grads[0];
    const at::Tensor dsum = has_y ? grads[1] : at::Tensor();
    const at::Tensor dwide = grads.size() > 1 + std::size_t{has_y} ? grads.back() : at::Tensor();
    variable_list result(5);  // x, y, gain, bias, narrow
    if (!dnormalised.defined() && !dwide.defined()) {
      result[0] = dsum;
      if (has_y && dsum.defined()) result[1] = dsum.to(narrow);
      return result;
    }
    // Hooks may have saved others, of another type or shape.
    const auto is = [](const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
      return !t.defined() || (t.scalar_type() == dtype && t.sizes() == sizes);
    };
    const at::ScalarType wide = accumulation_type(narrow);
    const bool served =
        !needs_pieces_backward({sum, gain, bias, dnormalised, dsum, dwide}) && sum.dim() > 0 &&
        sum.numel() > 0 && sum.scalar_type() == wide && is(dnormalised, narrow, sum.sizes()) &&
        is(dsum, wide, sum.sizes()) && is(dwide, wide, sum.sizes()) &&
        is(gain, wide, sum.sizes().slice(sum.dim() - 1)) && is(bias, wide, gain.sizes());
    if (!served) {
      const auto found = differentiate(
          [&](const variable_list& in) { return norm_of(in[0], in[1], in[2], narrow); },
          {sum, gain, bias}, {dnormalised, dwide});
      result = {dsum.defined() ? dsum + found[0] : found[0], {}, found[1], found[2], {}};
      if (has_y) result[1] = result[0].to(narrow);
      return result;
    }
    check_all_readable(name_of(bias), {{"the saved sum", sum}, {"the saved gain", gain}});
    const at::Tensor sum_ = contiguous(sum), gain_ = contiguous(gain), dsum_ = contiguous(dsum),
                     dnormalised_ = contiguous(dnormalised), dwide_ = contiguous(dwide);
    const at::Tensor dx = at::empty(sum.sizes(), sum.options());
    const bool is_rounded = has_y && narrow != sum.scalar_type();
    const at::Tensor dy = is_rounded ? at::empty(sum.sizes(), sum.options().dtype(narrow)) : dx;
    const at::Tensor dgain = at::empty_like(gain_);
    const at::Tensor dbias = bias.defined() ? at::empty_like(gain_) : at::Tensor();
    run_kernel(recurrence::ResidualNormBackward{.dtype = kernel_dtype(narrow),
                                                .norm = bias.defined() ? Norm::kLayer : Norm::kRms,
                                                .rows = sum.numel() / gain.numel(),
                                                .columns = gain.numel(),
                                                .sum = sum_.const_data_ptr(),
                                                .gain = gain_.const_data_ptr(),
                                                .dsum = numbers_of(dsum_),
                                                .dnormalised = numbers_of(dnormalised_),
                                                .dnormalised_wide = numbers_of(dwide_),
                                                .dx = dx.mutable_data_ptr(),
                                                .dy = is_rounded ? dy.mutable_data_ptr() : nullptr,
                                                .dgain = dgain.mutable_data_ptr(),
                                                .dbias = data_of(dbias)},
               sum.device());
    return {dx, has_y ? dy : at::Tensor(), dgain, dbias, {}};
  }
};

/// That of autocast where it is enabled. It leaves float64 alone.
std::optional<at::ScalarType> autocast_type(const at::Tensor& x) {
  const auto device = x.device().type();
  const bool casts = x.scalar_type() != at::kDouble &&
                     at::autocast::is_autocast_available(device) &&
                     at::autocast::is_autocast_enabled(device);
  return casts ? std::optional(at::autocast::get_autocast_dtype(device)) : std::nullopt;
}

/// Whether the kernel takes them: x and gain wide, y in `narrow`, whose accumulations are x's.
bool is_served(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gain,
               const at::Tensor& bias, at::ScalarType narrow) {
  const auto is_wide = [&](const at::Tensor& t) {
    return is_plain_cpu(t) && t.scalar_type() == x.scalar_type();
  };
  return is_wide(x) && x.numel() > 0 && is_wide(gain) && x.dim() > 0 &&
         gain.sizes() == x.sizes().slice(x.dim() - 1) &&
         (!bias.defined() || (is_wide(bias) && bias.sizes() == gain.sizes())) &&
         std::ranges::find(kRealTypes, narrow) != kRealTypes.end() &&
         accumulation_type(narrow) == x.scalar_type() &&
         (!y.defined() ||
          (is_plain_cpu(y) && y.scalar_type() == narrow && y.sizes() == x.sizes())) &&
         !needs_pieces({x, y, gain, bias});
}

/// Normalised, sum, and normalised before it is rounded: the same where nothing is.
struct Results {
  at::Tensor normalised, sum, wide;
};

Results residual_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gain,
                      const at::Tensor& bias) {
  const std::optional<at::ScalarType> cast = autocast_type(x);
  const at::ScalarType narrow = cast.value_or(x.scalar_type());
  if (!is_served(x, y, gain, bias, narrow)) {
    const at::Tensor sum = y.defined() ? x + y : x;
    const auto normalised = norm_of(sum, gain, bias, cast);
    return {normalised.front(), sum, normalised.back()};
  }
  const char* const gain_name = bias.defined() ? "weight" : "gamma";
  check_all_readable(name_of(bias), {{"x", x}, {gain_name, gain}, {"y", y}, {"bias", bias}});
  const auto given = [](const at::Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
  };
  const auto results = ResidualNormFunction::apply(x, given(y), gain, given(bias), narrow);
  return {results.front(), y.defined() ? results[1] : x,
          bias.defined() && narrow != x.scalar_type() ? results.back() : results.front()};
}

}  // namespace

Normalised add_then_rms_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gamma) {
  const auto results = residual_norm(x, y, gamma, {});
  return {.stream = results.sum, .input = results.normalised};
}

Normalised add_then_layer_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight,
                               const at::Tensor& bias) {
  const auto results = residual_norm(x, y, weight, bias);
  return {.stream = results.wide, .input = results.normalised};
}

namespace {

std::tuple<at::Tensor, at::Tensor> rms_norm_of_sum(const at::Tensor& x, const at::Tensor& y,
                                                   const at::Tensor& gamma) {
  const auto [stream, input] = add_then_rms_norm(x, y, gamma);
  return {stream, input};
}

/// No tensor twice: results of an operator may not share memory.
std::vector<at::Tensor> layer_norm_of_sum(const at::Tensor& x, const at::Tensor& y,
                                          const at::Tensor& weight, const at::Tensor& bias) {
  const auto [stream, input] = add_then_layer_norm(x, y, weight, bias);
  if (input.is_same(stream)) return {stream};
  return {stream, input};
}

}  // namespace

// For Python's modules. Here y is given, so that no result is an argument.
TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("add_then_rms_norm(Tensor x, Tensor y, Tensor gamma) -> (Tensor stream, Tensor input)",
        rms_norm_of_sum, {at::Tag::pt2_compliant_tag});
  // [stream], and under autocast [stream, input].
  m.def("add_then_layer_norm(Tensor x, Tensor y, Tensor weight, Tensor bias) -> Tensor[]",
        layer_norm_of_sum, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gateloop, FuncTorchBatchedDecomposition, m) {
  m.impl("add_then_rms_norm", rms_norm_of_sum);
  m.impl("add_then_layer_norm", layer_norm_of_sum);
}

}  // namespace gateloop::ops
