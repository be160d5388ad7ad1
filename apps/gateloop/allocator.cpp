#include "allocator.h"

#include <cstddef>

extern "C" {
/// What jemalloc reads at its start (jemalloc(3), "TUNING"). Each training step allocates and frees
/// the same tensors. Freed memory is kept: fetched again as zeroed pages it took 7 % of a quick
/// step. Large tensors share the arenas of small ones.
const char* malloc_conf = "dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0";

// jemalloc's. Null in builds for sanitizers, which have an allocator of their own.
[[gnu::weak]] int mallctl(const char* name, void* old, std::size_t* old_size, void* given,
                          std::size_t given_size);
}

namespace gateloop::app {

void release_freed_memory() {
  constexpr const char* kAllArenas = "arena.4096.purge";  // MALLCTL_ARENAS_ALL
  if (mallctl != nullptr) mallctl(kAllArenas, nullptr, nullptr, nullptr, 0);
}

}  // namespace gateloop::app
