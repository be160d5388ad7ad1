#pragma once

/// Memory that kernels are lent.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace gateloop::recurrence {

/// Grows, never shrinks, and begins on a cache line. What was in it is lost where it grows.
class Scratch {
 public:
  void* bytes(std::size_t size) {
    if (size > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(size, kLine)));
      size_ = size;
    }
    return memory_.get();
  }
  float* floats(std::int64_t count) {
    return static_cast<float*>(bytes(static_cast<std::size_t>(count) * sizeof(float)));
  }
  void* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t size_ = 0;
};

}  // namespace gateloop::recurrence
