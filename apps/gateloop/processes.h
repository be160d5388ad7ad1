#pragma once

/// Work that all processes of a launch do together.
#include <functional>
#include <string>

#include "gateloop/distributed.h"

namespace gateloop::app {

/// Joins the processes that the environment names, calls `work` in each and returns their
/// communicator; where one fails, all end with its error. Throws UsageError for variables or a
/// backend that are wrong. Also throws what `work` throws.
distributed::Communicator work_together(
    const std::string& backend, int timeout,
    const std::function<void(const distributed::Communicator&)>& work);

/// Of a command that one process runs: report_to_others() then has nobody to tell.
void work_alone();

}  // namespace gateloop::app
