#pragma once

namespace gateloop::app {

/// Gives the system what this program has freed, which it keeps otherwise.
void release_freed_memory();

}  // namespace gateloop::app
