#pragma once

/// The instruction set the kernels run on. Chosen once, the best the processor has; the tests force
/// each in turn.
#include <string>
#include <vector>

namespace gateloop::recurrence::cpu {

/// Name of the target that the next run() executes, as told by the code compiled for it.
const char* active_target();
/// Compiled in and supported here, best first.
std::vector<std::string> targets();
/// Makes every later run() use this target; an empty name restores the choice. Not while one runs.
void force_target(const std::string& name);

}  // namespace gateloop::recurrence::cpu
