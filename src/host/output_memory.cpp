#include "host/output_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "host/pages.h"

namespace gateloop::host {

#if defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)

namespace {

bool advise(std::uintptr_t begin, std::uintptr_t end, int advice) {
  return ::madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
}

}  // namespace

void ready_output(void* data, std::size_t bytes, std::int64_t batch,
                  const recurrence::Executor& executor) {
  if (bytes <= kLargestOfMalloc) return;
  // Outwards, for malloc's own words before and after: inwards, up to 1022 small pages would be
  // left, which cost 4 ms.
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = address / kPage * kPage;
  const std::uintptr_t end = round_up(address + bytes, kPage);
  const int threads = executor.parallel_for ? executor.threads : 1;
  if (!advise(begin, end, MADV_HUGEPAGE) || batch >= threads) return;
  const auto border = [&](std::int64_t share) {
    const std::uintptr_t even = begin + (end - begin) / static_cast<std::uintptr_t>(threads) *
                                            static_cast<std::uintptr_t>(share);
    return share == threads ? end : std::max(begin, even / kLargePage * kLargePage);
  };
  executor.parallel_for(threads, [&](std::int64_t share) {
    advise(border(share), border(share + 1), MADV_POPULATE_WRITE);
  });
}

#else

void ready_output(void*, std::size_t, std::int64_t, const recurrence::Executor&) {}

#endif

}  // namespace gateloop::host
