#include "model/machine.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <string>

#include "model/file.h"
#include "temporary_directory.h"

namespace gateloop::model {
namespace {

/// A folder that stands in for "/".
class MachineTest : public ::testing::Test {
 protected:
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root_ / path).parent_path());
    save_text(root_ / path, text);
  }
  void SetUp() override {
    all_ = usable_cpus(root_.path());  // no control groups: the affinity
    if (all_ < 2) GTEST_FAIL() << "quotas cannot be told from the affinity on one processor";
  }
  int cpus() { return usable_cpus(root_.path()); }

  test::TemporaryDirectory root_;
  int all_ = 0;
};

TEST_F(MachineTest, QuotasOfVersionTwo) {
  write("proc/self/cgroup", "0::/kubepods/pod7\n");
  EXPECT_EQ(cpus(), all_);
  write("sys/fs/cgroup/kubepods/pod7/cpu.max", "max 100000\n");
  EXPECT_EQ(cpus(), all_);
  write("sys/fs/cgroup/kubepods/pod7/cpu.max", "50000 100000\n");
  EXPECT_EQ(cpus(), 1);
  write("sys/fs/cgroup/kubepods/pod7/cpu.max", "110000 100000\n");
  EXPECT_EQ(cpus(), 2);
  write("sys/fs/cgroup/kubepods/pod7/cpu.max", "6400000 100000\n");
  EXPECT_EQ(cpus(), all_);
}

TEST_F(MachineTest, TheTightestGroupOfThePathCounts) {
  write("proc/self/cgroup", "0::/outer/inner\n");
  write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n");
  write("sys/fs/cgroup/outer/cpu.max", "100000 100000\n");
  EXPECT_EQ(cpus(), 1);
}

TEST_F(MachineTest, QuotasOfVersionOneAndOfMixtures) {
  write("proc/self/cgroup", "3:memory:/a\n2:cpu,cpuacct:/docker/abc\n0::/b\n");
  write("sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "-1\n");
  write("sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cpus(), all_);
  write("sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "100000\n");
  EXPECT_EQ(cpus(), 1);
}

TEST_F(MachineTest, AContainerSeesItsOwnGroupAsTheRoot) {
  write("proc/self/cgroup", "2:cpu,cpuacct:/docker/of/the/host\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "80000\n");
  write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cpus(), 1);
}

TEST_F(MachineTest, MalformedFilesAreNoLimit) {
  write("proc/self/cgroup", "nonsense\n\n0:\n0::\n0::/a/../b\n");
  write("sys/fs/cgroup/cpu.max", "much");
  write("sys/fs/cgroup/a/cpu.max", "0 0");
  EXPECT_EQ(cpus(), all_);
}

TEST_F(MachineTest, MemoryOfNestedGroups) {
  EXPECT_EQ(available_memory(root_.path()), 0);
  write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   1000 kB\n");
  EXPECT_EQ(available_memory(root_.path()), 1'024'000);
  write("proc/self/cgroup", "0::/outer/inner\n4:memory:/c\n");
  write("sys/fs/cgroup/outer/inner/memory.max", "max\n");
  write("sys/fs/cgroup/outer/inner/memory.current", "100\n");
  EXPECT_EQ(available_memory(root_.path()), 1'024'000);
  write("sys/fs/cgroup/outer/memory.max", "700000\n");
  write("sys/fs/cgroup/outer/memory.current", "100000\n");
  EXPECT_EQ(available_memory(root_.path()), 600'000);
  write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "500000\n");
  write("sys/fs/cgroup/memory/c/memory.usage_in_bytes", "600000\n");
  EXPECT_EQ(available_memory(root_.path()), 0);
}

TEST(Machine, AffinityLimitsTheProcessors) {
  cpu_set_t before;
  ASSERT_EQ(::sched_getaffinity(0, sizeof before, &before), 0);
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(::sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(usable_cpus(), 1);
  ASSERT_EQ(::sched_setaffinity(0, sizeof before, &before), 0);
}

}  // namespace
}  // namespace gateloop::model
