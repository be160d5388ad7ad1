#include "host/output_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "harness.h"
#include "host/pages.h"

namespace gateloop::host {
namespace {

/// Fresh memory, of which an output takes a part that begins and ends inside of pages.
class Mapping {
 public:
  explicit Mapping(std::size_t bytes)
      : bytes_(bytes),
        data_(static_cast<std::byte*>(
            ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {}
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(data_, bytes_); }
  std::byte* data() const { return data_; }
  std::size_t pages_in_memory() const {
    std::vector<unsigned char> there(bytes_ / kPage);
    EXPECT_EQ(::mincore(data_, bytes_, there.data()), 0);
    return static_cast<std::size_t>(
        std::count_if(there.begin(), there.end(), [](unsigned char page) { return page & 1; }));
  }

 private:
  std::size_t bytes_;
  std::byte* data_;
};

/// Whether this system can take pages beforehand (Linux 5.14) and has large ones.
bool populates() {
#if defined(MADV_HUGEPAGE) && defined(MADV_POPULATE_WRITE)
  const Mapping probe(kPage);
  return ::madvise(probe.data(), kPage, MADV_HUGEPAGE) == 0 &&
         ::madvise(probe.data(), kPage, MADV_POPULATE_WRITE) == 0;
#else
  return false;
#endif
}

constexpr std::size_t kBytes = 20 * kLargePage, kOffset = kPage + 64;

TEST(OutputMemory, ThreadsTakeAllPagesOfOneSequenceBeforehand) {
  if (!populates()) GTEST_SKIP() << "no MADV_POPULATE_WRITE here";
  for (const int threads : {2, 3, 100}) {
    const Mapping memory(kBytes + 2 * kLargePage);
    ready_output(memory.data() + kOffset, kBytes, 1, testing::threads(threads));
    EXPECT_GE(memory.pages_in_memory(), kBytes / kPage + 1) << threads << " threads";
  }
}

TEST(OutputMemory, LeavesPagesToTheKernelWhereThreadsHaveSequencesOfTheirOwn) {
  const Mapping memory(kBytes + 2 * kLargePage);
  ready_output(memory.data() + kOffset, kBytes, 2, testing::threads(2));
  ready_output(memory.data() + kOffset, kBytes, 1, testing::threads(1));
  recurrence::Executor without_threads;
  without_threads.threads = 4;
  ready_output(memory.data() + kOffset, kBytes, 1, without_threads);
  EXPECT_EQ(memory.pages_in_memory(), 0U);
}

TEST(OutputMemory, LeavesMallocsPoolAlone) {
  const Mapping memory(kBytes);
  ready_output(memory.data() + kOffset, std::size_t{32} << 20, 1, testing::threads(2));
  EXPECT_EQ(memory.pages_in_memory(), 0U);
}

TEST(OutputMemory, ChangesNoByte) {
  const Mapping memory(kBytes + 2 * kLargePage);
  std::byte* const output = memory.data() + kOffset;
  const auto value = [](std::size_t i) { return static_cast<std::byte>(i * 7 + i / kPage); };
  for (std::size_t i = 0; i < kBytes; i += 64) output[i] = value(i);
  output[-1] = output[kBytes] = std::byte{42};
  ready_output(output, kBytes, 1, testing::threads(2));
  for (std::size_t i = 0; i < kBytes; i += 64) ASSERT_EQ(output[i], value(i)) << i;
  EXPECT_EQ(output[-1], std::byte{42});
  EXPECT_EQ(output[kBytes], std::byte{42});
}

}  // namespace
}  // namespace gateloop::host
