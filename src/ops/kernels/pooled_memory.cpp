#include "ops/kernels/pooled_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>

#include "host/memory_pool.h"

namespace gateloop::ops {
namespace {

void give_back(void* data) { host::MemoryPool::shared().give_back(data); }

class PooledAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    // A tensor may be resized to less, even to nothing, by its own allocator.
    if (!host::MemoryPool::keeps(bytes)) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* const data = host::MemoryPool::shared().take(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "gateloop: no memory for ", bytes,
                     " bytes of output");
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

std::int64_t release_unused_memory() {
  return static_cast<std::int64_t>(host::MemoryPool::shared().release_unused());
}

}  // namespace

at::Tensor empty_pooled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const std::size_t bytes =
      static_cast<std::size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  // An allocator that a program has set in torch is used instead of the pool.
  const bool own = c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator();
  if (!options.device().is_cpu() || !own || !host::MemoryPool::keeps(bytes)) {
    return at::empty(sizes, options);
  }
  static PooledAllocator allocator;
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   options.dtype().toScalarType(), std::nullopt);
}

// For Python: what PyTorch's own allocators call emptying the cache.
TORCH_LIBRARY_FRAGMENT(gateloop, m) {
  m.def("_release_unused_memory() -> int", release_unused_memory);
}

}  // namespace gateloop::ops
