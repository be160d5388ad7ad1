#pragma once

/// What explains a model later. Of the programs and libraries that gateloop_add_provenance() names:
/// at every revision they are linked anew.
#include <string>
#include <utility>
#include <vector>

namespace gateloop::model {

// Written by cmake/revision.cmake. The revision is git's, "" outside of a checkout.
extern const char* const kVersion;
extern const char* const kRevision;

/// A JSON object: "program" with its version, "revision", `versions` of libraries by name,
/// "processor", "command" line and "date" (UTC).
std::string provenance(const std::vector<std::pair<std::string, std::string>>& versions = {});

}  // namespace gateloop::model
