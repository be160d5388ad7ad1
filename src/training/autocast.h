#pragma once

#include <ATen/autocast_mode.h>

namespace gateloop::training {

/// Autocast on the CPU for the life of the object, in `dtype`; float32: none. Each weight is cast
/// once and the cast kept until the object dies (the update then makes it stale).
class Autocast {
 public:
  explicit Autocast(at::ScalarType dtype)
      : enabled_before_(at::autocast::is_autocast_enabled(at::kCPU)),
        dtype_before_(at::autocast::get_autocast_dtype(at::kCPU)) {
    at::autocast::set_autocast_enabled(at::kCPU, dtype != at::kFloat);
    if (dtype != at::kFloat) at::autocast::set_autocast_dtype(at::kCPU, dtype);
    at::autocast::increment_nesting();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, enabled_before_);
    at::autocast::set_autocast_dtype(at::kCPU, dtype_before_);
  }

 private:
  bool enabled_before_;
  at::ScalarType dtype_before_;
};

}  // namespace gateloop::training
