#include "model/machine.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <thread>

namespace gateloop::model {
namespace {

namespace fs = std::filesystem;

/// Calls visit(folder) for each group of `controller` that this process is in, from the outermost.
/// The paths of /proc/self/cgroup may be the host's where a container shows only the innermost
/// groups: folders that do not exist are left to the caller.
void for_each_group(const fs::path& root, const std::string& controller,
                    const std::function<void(const fs::path&)>& visit) {
  const fs::path mounts = root / "sys/fs/cgroup";
  std::ifstream file(root / "proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    // hierarchy:controller,controller:/path, without controllers in version 2
    std::istringstream fields(line);
    std::string controllers, group, path;
    std::getline(fields, group, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    const bool version2 = controllers.empty();
    if (!version2 && ("," + controllers + ",").find("," + controller + ",") == std::string::npos) {
      continue;
    }
    // Version 2 beside version 1 lies in "unified".
    for (const fs::path& mount : {version2 ? mounts : mounts / controller,
                                  version2 ? mounts / "unified" : mounts / controllers}) {
      fs::path folder = mount;
      visit(folder);
      for (const fs::path& part : fs::path(path).relative_path()) visit(folder /= part);
    }
  }
}

/// The number that the file begins with; NaN without one ("max").
double number_in(const fs::path& file) {
  std::ifstream content(file);
  double number = 0;
  return content >> number ? number : std::numeric_limits<double>::quiet_NaN();
}

int cpus_of_affinity() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());  // more than 1024 processors
}

}  // namespace

std::int64_t available_memory(const fs::path& root) {
  double available = 0;
  std::ifstream meminfo(root / "proc/meminfo");
  for (std::string word; meminfo >> word;) {
    if (word == "MemAvailable:" && meminfo >> available) available *= 1024;
  }
  for_each_group(root, "memory", [&](const fs::path& group) {
    for (const auto& [limit, used] :
         {std::pair{"memory.max", "memory.current"},
          std::pair{"memory.limit_in_bytes", "memory.usage_in_bytes"}}) {
      const double left = number_in(group / limit) - number_in(group / used);
      if (left < available) available = std::max(left, 0.0);  // not where either is NaN
    }
  });
  return static_cast<std::int64_t>(available);
}

int usable_cpus(const fs::path& root) {
  double cpus = cpus_of_affinity();
  for_each_group(root, "cpu", [&](const fs::path& group) {
    std::ifstream max(group / "cpu.max");  // "quota period" or "max period", in microseconds
    double quota = number_in(group / "cpu.cfs_quota_us");  // -1: none
    double period = number_in(group / "cpu.cfs_period_us");
    double value = 0;
    if (max >> value) {
      quota = value;
      max >> period;
    }
    if (quota > 0 && period > 0) cpus = std::min(cpus, std::ceil(quota / period));
  });
  return std::max(1, static_cast<int>(cpus));
}
}  // namespace gateloop::model
