#include "host/output_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>

#include "host/pages.h"

namespace gateloop::host {

#if defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)

namespace {

bool advise(std::uintptr_t begin, std::uintptr_t end, int advice) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the bounds of pages are computed.
  return ::madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
}

/// Fresh memory of an output, in whole pages.
struct Pages {
  std::uintptr_t begin = 0, end = 0;

  /// Outwards, for malloc's own words before and after: inwards, up to 1022 small pages would be
  /// left, which cost 4 ms.
  Pages(const void* data, std::size_t bytes) {
    if (bytes <= kLargestOfMalloc) return;
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    begin = address / kPage * kPage;
    end = round_up(address + bytes, kPage);
  }
  bool request_large() const { return begin < end && advise(begin, end, MADV_HUGEPAGE); }
  /// Borders lie between large pages.
  std::uintptr_t border(std::int64_t share, std::int64_t shares) const {
    const std::uintptr_t even = begin + (end - begin) / static_cast<std::uintptr_t>(shares) *
                                            static_cast<std::uintptr_t>(share);
    return share == shares ? end : std::max(begin, even / kLargePage * kLargePage);
  }
  /// False where the system cannot (before Linux 5.14).
  bool take(std::int64_t share, std::int64_t shares) const {
    const std::uintptr_t from = border(share, shares), to = border(share + 1, shares);
    return from >= to || advise(from, to, MADV_POPULATE_WRITE);
  }
};

int threads_of(const recurrence::Executor& executor) {
  return executor.parallel_for ? executor.threads : 1;
}

}  // namespace

void ready_output(void* data, std::size_t bytes, std::int64_t batch,
                  const recurrence::Executor& executor) {
  const Pages pages(data, bytes);
  const int threads = threads_of(executor);
  if (!pages.request_large() || batch >= threads) return;
  executor.parallel_for(threads, [&](std::int64_t share) { pages.take(share, threads); });
}

#else

void ready_output(void*, std::size_t, std::int64_t, const recurrence::Executor&) {}

#endif

}  // namespace gateloop::host
