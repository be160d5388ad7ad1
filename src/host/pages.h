#pragma once

/// Sizes that memory comes in.
#include <cstddef>

namespace gateloop::host {

inline constexpr std::size_t kPage = 4096;
inline constexpr std::size_t kLargePage = std::size_t{2} << 20;
/// What glibc's malloc may hand out again (the most that M_MMAP_THRESHOLD grows to). Above, every
/// allocation is fresh memory, which the system clears page by page as it is touched. 134 MB in
/// pages of 4 KiB cost 40 ms, and in pages of 2 MiB 11 ms. The recurrence that writes them takes 11
/// ms.
inline constexpr std::size_t kLargestOfMalloc = std::size_t{32} << 20;

constexpr std::size_t round_up(std::size_t bytes, std::size_t page) {
  return (bytes + page - 1) / page * page;
}

}  // namespace gateloop::host
