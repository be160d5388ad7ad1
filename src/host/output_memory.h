#pragma once

/// For outputs of kernels, in memory of torch or XLA.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "gateloop/recurrence.h"

namespace gateloop::host {

/// Makes ready an output of `batch` sequences that is about to be written whole. Where it is fresh
/// memory (above kLargestOfMalloc), requests large pages. Where there are fewer sequences than
/// threads, the threads take the pages before the kernel starts (134 MB: 6 ms): in the kernel one
/// that waits for a page holds up the others.
void ready_output(void* data, std::size_t bytes, std::int64_t batch,
                  const recurrence::Executor& executor);

struct Memory {
  void* data;
  std::size_t bytes;
};

/// The same for a kernel bound by memory, for which half of the threads are enough. Calls
/// compute(executor) with those; the others take the pages of all outputs ahead of it, from the
/// last byte to the first if `downwards`. JAX's linear_recurrence (1, 65536, 512) on two
/// threads: 20 ms with the pages before the kernel, 16.5 beside it.
void compute_behind_pages(std::span<const Memory> outputs, bool downwards, std::int64_t batch,
                          const recurrence::Executor& executor,
                          const std::function<void(const recurrence::Executor&)>& compute);

}  // namespace gateloop::host
