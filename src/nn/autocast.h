#pragma once

#include <ATen/autocast_mode.h>

namespace gateloop::nn {

/// Autocast on `device` for the life of the object, in `dtype`; float32: none. The cache of cast
/// weights is emptied at both ends: a copy made without gradients must not reach a training step,
/// nor one from before an update a later pass.
class Autocast {
 public:
  Autocast(at::DeviceType device, at::ScalarType dtype)
      : device_(device),
        was_enabled_(at::autocast::is_autocast_enabled(device)),
        was_dtype_(at::autocast::get_autocast_dtype(device)) {
    const bool reduced = at::isReducedFloatingType(dtype);
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device, reduced);
    if (reduced) at::autocast::set_autocast_dtype(device, dtype);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_dtype(device_, was_dtype_);
    at::autocast::set_autocast_enabled(device_, was_enabled_);
  }

 private:
  at::DeviceType device_;
  bool was_enabled_;
  at::ScalarType was_dtype_;
};

}  // namespace gateloop::nn
