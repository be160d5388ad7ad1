#include "gateloop/launch.h"

#include <charconv>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string_view>

namespace gateloop::distributed {
namespace {

constexpr const char* kAddress = "MASTER_ADDR";
constexpr const char* kPort = "MASTER_PORT";

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return {};
  return value;
}

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string("environment variable ") + name + ": expected " +
                              expected + ", got \"" + got + "\"");
}

std::string required(const char* name) {
  const auto value = variable(name);
  if (!value) fail(name, "a value, as launchers of several processes set it", "");
  return *value;
}

/// A number in [least, most].
std::int64_t number(const char* name, const std::string& text, std::int64_t least,
                    std::int64_t most) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || value < least || value > most) {
    fail(name, "a number from " + std::to_string(least) + " to " + std::to_string(most), text);
  }
  return value;
}

constexpr std::int64_t kMostProcesses = 1 << 20;
constexpr std::int64_t kMostCpus = 1 << 20;

/// The variables that differ from launcher to launcher.
struct Names {
  const char *rank, *size, *local_rank, *local_size;
};

/// torchrun's number, or the first of SLURM's "4(x2),3", which is for each machine.
int local_size(const char* name, int size) {
  const auto text = variable(name);
  if (!text) return 1;
  return static_cast<int>(number(name, text->substr(0, text->find_first_of("(,")), 1, size));
}

Launch numbered(const Names& names) {
  Launch launch;
  launch.size = static_cast<int>(number(names.size, required(names.size), 1, kMostProcesses));
  launch.rank = static_cast<int>(number(names.rank, required(names.rank), 0, launch.size - 1));
  if (const auto text = variable(names.local_rank)) {
    launch.local_rank = static_cast<int>(number(names.local_rank, *text, 0, launch.size - 1));
  }
  launch.local_size = local_size(names.local_size, launch.size);
  return launch;
}

/// The first of "n[01-03,7],m", SLURM's way to write a list of hosts: n01.
std::string first_host(const std::string& list) {
  const std::size_t open = list.find_first_of("[,");
  if (open == std::string::npos || list[open] == ',') return list.substr(0, open);
  const std::size_t end = list.find_first_of("-,]", open);
  const std::size_t close = list.find(']', open);
  if (end == std::string::npos || close == std::string::npos) {
    fail("SLURM_STEP_NODELIST", "a list of hosts", list);
  }
  const std::string after = list.substr(close + 1, list.find(',', close) - close - 1);
  return list.substr(0, open) + list.substr(open + 1, end - open - 1) + after;
}

/// The same on every process of a job's step, and seldom that of another.
std::uint16_t port_of(std::int64_t job, std::int64_t step) {
  constexpr std::int64_t kFirst = 20'000;
  constexpr std::int64_t kPorts = 10'000;
  constexpr std::int64_t kApart =
      101;  // jobs on one machine are often numbered one after the other
  return static_cast<std::uint16_t>(kFirst + (job + kApart * (step % kPorts)) % kPorts);
}

}  // namespace

Launch launch_from_environment() {
  const bool torchrun = variable("RANK") || variable("WORLD_SIZE");
  const bool slurm = !torchrun && variable("SLURM_STEP_NUM_TASKS") && variable("SLURM_PROCID");
  if (!torchrun && !slurm) return {};
  // SLURM_STEP_NUM_TASKS: srun alone sets it. A batch script has SLURM_NTASKS and is one process.
  Launch launch = torchrun ? numbered({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
                           : numbered({"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                                       "SLURM_STEP_TASKS_PER_NODE"});
  if (const auto text = slurm ? variable("SLURM_CPUS_PER_TASK") : std::nullopt) {
    launch.cpus = static_cast<int>(number("SLURM_CPUS_PER_TASK", *text, 1, kMostCpus));
  }
  if (launch.size == 1) return launch;
  if (slurm && !variable(kAddress)) {
    launch.address = first_host(required("SLURM_STEP_NODELIST"));
  } else {
    launch.address = required(kAddress);
  }
  if (slurm && !variable(kPort)) {
    constexpr std::int64_t kMostJobs = std::int64_t{1} << 40;
    const std::int64_t step =
        number("SLURM_STEP_ID", variable("SLURM_STEP_ID").value_or("0"), 0, kMostJobs);
    launch.port = port_of(number("SLURM_JOB_ID", required("SLURM_JOB_ID"), 0, kMostJobs), step);
  } else {
    launch.port = static_cast<std::uint16_t>(number(kPort, required(kPort), 1, 65'535));
  }
  launch.launcher_stores = variable("TORCHELASTIC_USE_AGENT_STORE") == "True";
  return launch;
}

}  // namespace gateloop::distributed
