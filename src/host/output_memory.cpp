#include "host/output_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

namespace gateloop::host {

#if defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)

namespace {

constexpr std::size_t kLargestPooled = std::size_t{32} << 20;  // glibc: M_MMAP_THRESHOLD's most
constexpr std::uintptr_t kPage = 4096, kLargePage = std::uintptr_t{2} << 20;

bool advise(std::uintptr_t begin, std::uintptr_t end, int advice) {
  return ::madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
}

}  // namespace

void ready_output(void* data, std::size_t bytes, std::int64_t batch,
                  const recurrence::Executor& executor) {
  if (bytes <= kLargestPooled) return;
  // Outwards, for malloc's own words before and after: inwards, up to 1022 small pages would be
  // left, which cost 4 ms.
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = address / kPage * kPage;
  const std::uintptr_t end = (address + bytes + kPage - 1) / kPage * kPage;
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
