#pragma once

/// What the kernels need of their host: XLA's threads, and memory.
#include <xla/ffi/api/ffi.h>

#include <cstddef>
#include <new>

#include "gateloop/recurrence.h"

namespace gateloop::jax {

/// XLA's intra-op pool. The caller takes part in the work, so that a pool all of whose threads are
/// busy, with calls of this kind too, delays nothing and cannot deadlock.
recurrence::Executor lend_threads(xla::ffi::ThreadPool& pool);

/// 64-byte aligned, as recurrence.h asks.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : data_(::operator new(bytes, kAlignment)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kAlignment); }
  void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_;
};

/// The kernel on XLA's threads. Scratch comes from the heap: XLA's allocator for handlers is one of
/// device memory, and its CPU client answers "No device memory allocator available". It is at most
/// some 256 KiB a thread, so that malloc hands the same memory out again.
template <class Params>
void run(const Params& params, const recurrence::Executor& executor) {
  const Scratch scratch(recurrence::scratch_bytes(params, executor.threads));
  recurrence::run(params, executor, scratch.data());
}

}  // namespace gateloop::jax
