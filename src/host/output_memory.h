#pragma once

/// For outputs of kernels, in memory of torch or XLA.
#include <cstddef>
#include <cstdint>

#include "gateloop/recurrence.h"

namespace gateloop::host {

/// Makes ready an output of `batch` sequences that is about to be written whole. Where it is fresh
/// memory (above kLargestOfMalloc), requests large pages. Where there are fewer sequences than
/// threads, the threads take the pages before the kernel starts (134 MB: 6 ms): in the kernel one
/// that waits for a page holds up the others.
void ready_output(void* data, std::size_t bytes, std::int64_t batch,
                  const recurrence::Executor& executor);

}  // namespace gateloop::host
