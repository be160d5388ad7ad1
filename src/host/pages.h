#pragma once

/// Sizes that memory comes in.
#include <cstddef>

namespace gateloop::host {

inline constexpr std::size_t kPage = 4096;
inline constexpr std::size_t kLargePage = std::size_t{2} << 20;
/// What malloc may hand out again; above, every allocation is fresh memory of the system's (glibc:
/// the most that M_MMAP_THRESHOLD grows to).
inline constexpr std::size_t kLargestOfMalloc = std::size_t{32} << 20;

constexpr std::size_t round_up(std::size_t bytes, std::size_t page) {
  return (bytes + page - 1) / page * page;
}

}  // namespace gateloop::host
