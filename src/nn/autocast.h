#pragma once

#include <ATen/autocast_mode.h>

namespace gateloop::nn {

/// Autocast on `device` for the life of the object, in `dtype`; float32: none. Without torch's
/// cache of cast weights: all threads share it, and a copy may outlive an update of its weight.
class Autocast {
 public:
  Autocast(at::DeviceType device, at::ScalarType dtype)
      : device_(device),
        was_enabled_(at::autocast::is_autocast_enabled(device)),
        was_dtype_(at::autocast::get_autocast_dtype(device)),
        was_cached_(at::autocast::is_autocast_cache_enabled()) {
    const bool reduced = at::isReducedFloatingType(dtype);
    at::autocast::set_autocast_cache_enabled(false);
    at::autocast::set_autocast_enabled(device, reduced);
    if (reduced) at::autocast::set_autocast_dtype(device, dtype);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    at::autocast::set_autocast_cache_enabled(was_cached_);
    at::autocast::set_autocast_dtype(device_, was_dtype_);
    at::autocast::set_autocast_enabled(device_, was_enabled_);
  }

 private:
  at::DeviceType device_;
  bool was_enabled_;
  at::ScalarType was_dtype_;
  bool was_cached_;
};

}  // namespace gateloop::nn
