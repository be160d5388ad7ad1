#pragma once

/// What a process may use of the machine.
#include <cstdint>
#include <filesystem>

namespace gateloop::model {

// `root` is where /proc and /sys are looked for. Control groups of version 1 and 2 are both read;
// groups lie in one another, and the tightest limit counts.

/// What this process may still take: MemAvailable, or less where a control group limits it.
/// 0 where the system does not say.
std::int64_t available_memory(const std::filesystem::path& root = "/");

/// Processors that this process may use: those of its affinity, or fewer where a control group
/// limits its time. A part of one counts as one: the quota stops all threads together, so that a
/// thread more never makes them slower. At least 1.
int usable_cpus(const std::filesystem::path& root = "/");

}  // namespace gateloop::model
