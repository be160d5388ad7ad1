#include "host/memory_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include "host/pages.h"

namespace gateloop::host {
namespace {

/// Blocks not in use: what polar_gate_loop at (1, 65536, 512) writes forward and backward is
/// 805 MB.
constexpr std::size_t kMostUnused = std::size_t{1} << 30;
/// In per cent: of a block in use a fifth at most lies idle.
constexpr std::size_t kLeastShare = 80;

/// At the start of a large page.
void* map(std::size_t size) {
  void* const found = ::mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(found);
  const auto address = reinterpret_cast<std::size_t>(begin);
  const std::size_t before = round_up(address, kLargePage) - address;
  if (before > 0) ::munmap(begin, before);
  if (before < kLargePage) ::munmap(begin + before + size, kLargePage - before);
  return begin + before;
}

}  // namespace

MemoryPool& MemoryPool::shared() {
  static auto* const pool = new MemoryPool;
  // A child that is forked while another thread holds the lock could never take it.
  static const int guarded = ::pthread_atfork(
      [] { pool->mutex_.lock(); }, [] { pool->mutex_.unlock(); }, [] { pool->mutex_.unlock(); });
  static_cast<void>(guarded);
  return *pool;
}

bool MemoryPool::keeps(std::size_t bytes) { return bytes > kLargestOfMalloc; }

void* MemoryPool::reuse(std::size_t bytes) {
  const auto block = unused_.lower_bound(bytes);
  if (block == unused_.end() || bytes < block->first / 100 * kLeastShare) return nullptr;
  const auto [size, data] = *block;
  unused_.erase(block);
  unused_bytes_ -= size;
  in_use_.emplace(data, size);
  return data;
}

void* MemoryPool::take(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (void* const data = reuse(bytes)) return data;
  const std::size_t size = round_up(bytes, kLargePage);
  // What lies here and does not fit is released. Otherwise a program whose sizes change would hold
  // blocks of the old sizes and of the new.
  release(size);
  void* const data = map(size);
  if (data != nullptr) in_use_.emplace(data, size);
  return data;
}

void MemoryPool::give_back(void* data) {
  const std::lock_guard lock(mutex_);
  const auto block = in_use_.find(data);
  if (block == in_use_.end()) return;
  const std::size_t size = block->second;
  in_use_.erase(block);
  if (size > kMostUnused) {
    ::munmap(data, size);
    return;
  }
  if (unused_bytes_ + size > kMostUnused) release(unused_bytes_ + size - kMostUnused);
#ifdef MADV_FREE
  ::madvise(data, size, MADV_FREE);
#endif
  unused_.emplace(size, data);
  unused_bytes_ += size;
}

/// The smallest blocks first, because the large cost most to get again. Ends when `at_least` bytes
/// are gone or nothing is left.
std::size_t MemoryPool::release(std::size_t at_least) {
  std::size_t gone = 0;
  while (gone < at_least && !unused_.empty()) {
    const auto [size, data] = *unused_.begin();
    ::munmap(data, size);
    unused_.erase(unused_.begin());
    unused_bytes_ -= size;
    gone += size;
  }
  return gone;
}

std::size_t MemoryPool::release_unused() {
  const std::lock_guard lock(mutex_);
  return release(unused_bytes_);
}

std::size_t MemoryPool::unused_bytes() const {
  const std::lock_guard lock(mutex_);
  return unused_bytes_;
}

}  // namespace gateloop::host
