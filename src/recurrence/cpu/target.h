#pragma once

/// What a run() finds out about the machine, and how the tests force each choice. Neither hook may
/// be called while a run() is under way.
#include <cstdint>
#include <string>
#include <vector>

namespace gateloop::recurrence::cpu {

/// Name of the target that the next run() executes, as named by the code compiled for it.
const char* active_target();
/// Compiled in and supported here, best first.
std::vector<std::string> targets();
/// Makes every later run() use this target; an empty name restores the choice.
void force_target(const std::string& name);

/// Whether outputs of this many bytes in all are written past the cache: it would not keep them.
bool bypasses_cache(std::int64_t output_bytes);
/// Moves the bound, which is kStreamBytes.
void set_stream_bytes(std::int64_t bytes);

}  // namespace gateloop::recurrence::cpu
