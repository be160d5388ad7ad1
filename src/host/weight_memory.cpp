#include "host/weight_memory.h"

#include <sys/mman.h>

#include <cstdint>

#include "host/pages.h"

namespace gateloop::host {

#ifdef __linux__

void move_to_large_pages(const void* data, std::size_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, which glibc 2.36 does not name
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  // Outwards and page by page, for the ends may lie in pages that cannot be moved: in part not
  // mapped, or of a file.
  for (std::uintptr_t page = begin / kLargePage * kLargePage; page < begin + bytes;
       page += kLargePage) {
    ::madvise(reinterpret_cast<void*>(page), kLargePage, kCollapse);
  }
}

#else

void move_to_large_pages(const void*, std::size_t) {}

#endif

}  // namespace gateloop::host
