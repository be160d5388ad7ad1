#pragma once

/// Of the memory that torch and XLA lend the kernels.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "gateloop/recurrence.h"

namespace gateloop::host {

/// Makes ready an output of `batch` sequences that is about to be written whole: where it is fresh
/// memory (above kLargestOfMalloc), asks for large pages; and where there are fewer sequences than
/// threads, the threads take them before the kernel starts (134 MB: 6 ms), for there one that waits
/// for a page in the kernel holds up the others.
void ready_output(void* data, std::size_t bytes, std::int64_t batch,
                  const recurrence::Executor& executor);

struct Memory {
  void* data;
  std::size_t bytes;
};

/// The same for a kernel that is bound by memory, with which half of the threads keep up: calls
/// compute(executor) with those, while the others take the pages of all outputs ahead of it, from
/// the last byte to the first if `downwards`. JAX's linear_recurrence (1, 65536, 512) on two
/// threads: 20 ms with the pages before the kernel, 16.5 beside it.
void compute_behind_pages(std::span<const Memory> outputs, bool downwards, std::int64_t batch,
                          const recurrence::Executor& executor,
                          const std::function<void(const recurrence::Executor&)>& compute);

}  // namespace gateloop::host
