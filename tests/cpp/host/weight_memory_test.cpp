#include "host/weight_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <numeric>
#include <span>
#include <string>

#include "host/pages.h"

namespace gateloop::host {
namespace {

/// Bytes of this process in large pages.
std::size_t in_large_pages() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    std::size_t kilobytes = 0;
    if (word == "AnonHugePages:" && file >> kilobytes) return kilobytes << 10;
  }
  return 0;
}

/// A mapping whose first and last pages are gone, so that weights between them begin and end beside
/// holes.
class Weights : public testing::Test {
 protected:
  static constexpr std::size_t kBytes = 8 * kLargePage;
  std::byte* memory = static_cast<std::byte*>(
      ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  std::span<std::uint32_t> numbers{reinterpret_cast<std::uint32_t*>(memory + kPage),
                                   (kBytes - 2 * kPage) / sizeof(std::uint32_t)};

  void SetUp() override {
    ::munmap(memory, kPage);
    ::munmap(memory + kBytes - kPage, kPage);
    std::iota(numbers.begin(), numbers.end(), 7u);
  }
  void TearDown() override { ::munmap(memory + kPage, kBytes - 2 * kPage); }
  bool are_untouched() const {
    std::uint32_t next = 7;
    return std::all_of(numbers.begin(), numbers.end(),
                       [&](auto number) { return number == next++; });
  }
};

TEST_F(Weights, KeepTheirAddressAndContents) {
  move_to_large_pages(numbers.data(), numbers.size_bytes());
  EXPECT_TRUE(are_untouched());
  move_to_large_pages(numbers.data() + 5, 64);  // less than a page, already moved
  EXPECT_TRUE(are_untouched());
  move_to_large_pages(numbers.data(), 0);
}

TEST_F(Weights, LieInLargePagesThen) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE
  const auto second = round_up(reinterpret_cast<std::uintptr_t>(memory + kPage), kLargePage);
  if (::madvise(reinterpret_cast<void*>(second), kLargePage, kCollapse) != 0) {
    GTEST_SKIP() << "this system does not move pages on demand (Linux 6.1)";
  }
  const std::size_t before = in_large_pages();
  move_to_large_pages(numbers.data(), numbers.size_bytes());
  // All but one of those that lie in the mapping whole.
  EXPECT_GE(in_large_pages() - before, kBytes - 3 * kLargePage);
}

}  // namespace
}  // namespace gateloop::host
