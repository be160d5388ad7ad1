#pragma once

/// Large blocks of memory, kept from one call to the next.
#include <cstddef>
#include <map>
#include <mutex>

namespace gateloop::host {

/// Above malloc's largest pool (kLargestOfMalloc) every allocation is fresh memory, which the
/// system clears page by page. Blocks that come back stay here in their pages for the next of about
/// their size. The system may take the pages meanwhile if it runs short of memory (Linux:
/// MADV_FREE).
class MemoryPool {
 public:
  /// The one of this process; it outlives every tensor.
  static MemoryPool& shared();

  /// Sizes below are malloc's.
  static bool keeps(std::size_t bytes);

  /// From the start of a large page on; null if there is no memory.
  void* take(std::size_t bytes);
  void give_back(void* data);

  /// Gives unused blocks to the system; returns how many bytes that was.
  std::size_t release_unused();
  std::size_t unused_bytes() const;

 private:
  void* reuse(std::size_t bytes);
  std::size_t release(std::size_t at_least);

  mutable std::mutex mutex_;
  std::map<void*, std::size_t> in_use_;
  std::multimap<std::size_t, void*> unused_;
  std::size_t unused_bytes_ = 0;
};

}  // namespace gateloop::host
