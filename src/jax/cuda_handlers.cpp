// The handlers that XLA calls on a CUDA device: they queue work on its stream and return.
#include <xla/ffi/api/ffi.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "gateloop/recurrence_cuda.h"
#include "jax/operations.h"

namespace gateloop::jax {
namespace {

using Stream = ffi::PlatformStream<CUstream_st*>;

/// XLA's allocator has no alignments above 16 bytes, so that 256 are taken out of more memory. The
/// memory is free again when the handler returns, but for later work of the stream only.
void* scratch_of(std::size_t bytes, ffi::ScratchAllocator& allocator) {
  if (bytes == 0) return nullptr;
  constexpr std::size_t kAlignment = 256;
  std::size_t space = bytes + kAlignment - 1;
  const auto memory = allocator.Allocate(space);
  if (!memory.has_value()) throw std::bad_alloc();
  void* data = *memory;
  return std::align(kAlignment, bytes, data, space);
}

template <class Params, class... Buffers>
auto on_cuda(const char* name, Kernel<Params> (*operation)(Attributes, Buffers...)) {
  return [=](CUstream_st* stream, std::int32_t device, ffi::ScratchAllocator allocator,
             bool reverse, bool time_last, Buffers... buffers) {
    return guarded(name, [&] {
      const Params p = operation({reverse, time_last}, buffers...).params;
      void* const scratch = scratch_of(recurrence::cuda::scratch_bytes(p), allocator);
      recurrence::cuda::run(p, {stream, device, scratch});
    });
  };
}
auto platform() {
  return ffi::Ffi::Bind().Ctx<Stream>().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::ScratchAllocator>();
}

/// Of one step. XLA may record it in a command buffer (a CUDA graph), which it replays with the
/// same addresses: that excludes scratch, which is other memory in every call. One step needs none.
template <class Params, class... Buffers>
auto step_on_cuda(const char* name, Kernel<Params> (*operation)(Attributes, Buffers...)) {
  return [=](CUstream_st* stream, std::int32_t device, bool reverse, bool time_last,
             Buffers... buffers) {
    return guarded(name, [&] {
      const Params p = operation({reverse, time_last}, buffers...).params;
      if (recurrence::cuda::scratch_bytes(p) != 0) {
        throw std::invalid_argument("time must be 1, got " + std::to_string(p.shape.time));
      }
      recurrence::cuda::run(p, {stream, device, nullptr});
    });
  };
}
auto step_platform() { return ffi::Ffi::Bind().Ctx<Stream>().Ctx<ffi::DeviceOrdinal>(); }

}  // namespace

#define GATELOOP_JAX_HANDLER(operation)                                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(gateloop_jax_##operation##_cuda, on_cuda(#operation, operation), \
                                bound(platform(), operation))
#define GATELOOP_JAX_STEP_HANDLER(operation)                                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                 \
      gateloop_jax_##operation##_step_cuda, step_on_cuda(#operation, operation), \
      bound(step_platform(), operation), {ffi::Traits::kCmdBufferCompatible})

#pragma GCC visibility push(default)
GATELOOP_JAX_HANDLER(linear_recurrence);
GATELOOP_JAX_HANDLER(linear_recurrence_backward);
GATELOOP_JAX_HANDLER(polar_gate_loop);
GATELOOP_JAX_HANDLER(polar_gate_loop_backward);
GATELOOP_JAX_HANDLER(simple_gate_loop);
GATELOOP_JAX_HANDLER(simple_gate_loop_backward);
GATELOOP_JAX_STEP_HANDLER(linear_recurrence);
GATELOOP_JAX_STEP_HANDLER(polar_gate_loop);
GATELOOP_JAX_STEP_HANDLER(simple_gate_loop);
#pragma GCC visibility pop

}  // namespace gateloop::jax
