#pragma once

/// Small things several modules share.
#include <ATen/autocast_mode.h>
#include <torch/torch.h>

#include <cstdint>
#include <stdexcept>

#include "gateloop/model.h"
#include "gateloop/nn/linear.h"

namespace gateloop::nn {

/// x must be (B, T, dim) of a floating dtype.
inline void check_sequence(const char* module, const torch::Tensor& x, std::int64_t dim) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) == dim && x.is_floating_point(), module,
              ": x must be (B, T, ", dim, ") and floating point, got ", x.scalar_type(),
              " of shape ", x.sizes());
}

/// work(), whose std::invalid_argument becomes a c10::Error, as other errors of modules are.
template <typename Work>
auto as_torch_error(const Work& work) {
  try {
    return work();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK(false, error.what());
  }
}

inline void check_positive(const char* module, const char* option, std::int64_t value) {
  TORCH_CHECK(value > 0, module, ": ", option, " must be positive, got ", value);
}

inline void check_mixer(const model::MixerSpec& mixer) {
  as_torch_error([&] { model::check(mixer); });
}

inline Linear linear(std::int64_t in, std::int64_t out, bool bias) {
  return Linear(torch::nn::LinearOptions(in, out).bias(bias));
}

/// Up to three projections read x, and under autocast each would cast it anew; this casts it once.
inline torch::Tensor cast_once(const torch::Tensor& x) {
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return x;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
}

/// The reference keeps some layers inside a Sequential, which shows in the parameter names:
/// `name`.`index`.weight.
template <typename Layer>
Layer register_nested(torch::nn::Module& parent, const char* name, const char* index, Layer layer) {
  parent.register_module(name, torch::nn::Sequential({{index, layer}}));
  return layer;
}

}  // namespace gateloop::nn
