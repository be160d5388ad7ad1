#include "host/large_pages.h"

#include <sys/mman.h>

#include <memory>

namespace gateloop::host {

void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::size_t kLargestPooled = std::size_t{32} << 20;  // glibc: M_MMAP_THRESHOLD's most
  constexpr std::size_t kPage = std::size_t{2} << 20;
  if (bytes > kLargestPooled && std::align(kPage, kPage, data, bytes) != nullptr) {
    ::madvise(data, bytes / kPage * kPage, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace gateloop::host
