// What the compiled kernels take of an SM, as ptxas reports it. And the error of a launch where
// there is no device.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <regex>
#include <string>

#include "../harness.h"
#include "gateloop/recurrence_cuda.h"
#include "recurrence/cuda/launch_table.h"

namespace gateloop::testing::cuda {
namespace {

using recurrence::cuda::Launch;

struct Resources {
  std::string kernel;  // mangled
  int architecture = 0;
  int stack = -1, spilled = -1, registers = -1, shared = 0;
};

/// One for each kernel and architecture of a report.
std::vector<Resources> read_report(const std::filesystem::path& path) {
  const std::regex entry("Compiling entry function '(\\S+)' for 'sm_(\\d+)");
  const std::regex stack("(\\d+) bytes stack frame, (\\d+) bytes spill stores");
  const std::regex used("Used (\\d+) registers"), shared("(\\d+) bytes smem");
  std::vector<Resources> all;
  std::ifstream report(path);
  std::smatch match;
  for (std::string line; std::getline(report, line);) {
    if (std::regex_search(line, match, entry)) {
      all.push_back({.kernel = match[1], .architecture = std::stoi(match[2])});
    } else if (!all.empty() && std::regex_search(line, match, stack)) {
      all.back().stack = std::stoi(match[1]);
      all.back().spilled = std::stoi(match[2]);
    } else if (!all.empty() && std::regex_search(line, match, used)) {
      all.back().registers = std::stoi(match[1]);
      if (std::regex_search(line, match, shared)) all.back().shared = std::stoi(match[1]);
    }
  }
  return all;
}

/// The Launch of its Tile, as its name has it.
Launch launch_of(const std::string& kernel) {
  const std::regex launch("6LaunchELi(\\d+)ELi(\\d+)ELi(\\d+)ELi(\\d+)ELi(\\d+)E");
  std::smatch match;
  if (!std::regex_search(kernel, match, launch)) throw std::runtime_error("no launch: " + kernel);
  const auto field = [&](std::size_t i) { return std::stoi(match[i]); };
  return {field(1), field(2), field(3), field(4), field(5)};
}

void expect_within(const Resources& r) {
  SCOPED_TRACE(r.kernel);
  Launch launch = launch_of(r.kernel);
  if (r.kernel.find("norm_kernel") != std::string::npos)
    launch.blocks = recurrence::cuda::norm_blocks_held(launch.blocks, r.architecture);
  // Checked where kernels are tuned or packaged; other GPUs have other limits.
  if (r.architecture == 80 || r.architecture == 90 || r.architecture == 100) {
    EXPECT_EQ(r.stack, 0);
    EXPECT_EQ(r.spilled, 0);
  }
  EXPECT_GT(r.registers, 0);
  EXPECT_LE(r.registers, launch.registers());
  EXPECT_LE(r.shared, launch.shared_bytes());
}

/// `count` kernels of each architecture; of a scan forward, one step and backward of each dtype.
void expect_kernels(const std::string& file, std::size_t count) {
  SCOPED_TRACE(file);
  const auto path = std::filesystem::path(GATELOOP_PTXAS_REPORTS) / (file + ".cu.o.ptxas");
  const auto kernels = read_report(path);
  EXPECT_GT(kernels.size(), 0u) << "no report " << path;
  EXPECT_EQ(kernels.size() % count, 0u) << kernels.size() << " kernels";
  for (const Resources& kernel : kernels) expect_within(kernel);
}

TEST(CudaResources, AreWhatTheLaunchTableSays) {
  expect_kernels("linear_recurrence", 3 * 6);
  expect_kernels("polar_gate_loop", 3 * 4);
  expect_kernels("simple_gate_loop", 2 * 3 * 4);  // with and without normalized inputs
  // Of every size, in vectors and not, forward and backward; and the sums of dgain.
  expect_kernels("rms_norm", (2 * 2 * (recurrence::cuda::kNormSizes + 1) + 1) * 4);
}

/// Device -1 exists nowhere.
template <class Params>
void expect_named(const std::string& name) {
  Params p;
  if constexpr (requires { p.rows; }) {
    p.rows = p.columns = 1;
  } else {
    p.shape = {1, 1, 1};
  }
  try {
    recurrence::cuda::run(p, {.device = -1});
    ADD_FAILURE() << name << " ran";
  } catch (const std::runtime_error& error) {
    EXPECT_EQ(std::string(error.what()).find(name + ": "), 0u) << error.what();
    EXPECT_NE(std::string(error.what()).find("(cudaError"), std::string::npos) << error.what();
  }
}

TEST(CudaErrors, NameTheOperationAndWhatCudaSays) {
  expect_named<recurrence::LinearRecurrence>("LinearRecurrence");
  expect_named<recurrence::PolarGateLoopBackward>("PolarGateLoopBackward");
  expect_named<recurrence::SimpleGateLoop>("SimpleGateLoop");
  expect_named<recurrence::RmsNorm>("RmsNorm");
  expect_named<recurrence::RmsNormBackward>("RmsNormBackward");
}

}  // namespace
}  // namespace gateloop::testing::cuda
