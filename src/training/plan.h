#pragma once

#include <string>
#include <vector>

#include "gateloop/training.h"

namespace gateloop::training {

/// A plan in one line: [[step, steps], ...].
std::string plan_to_json(const std::vector<PlannedLength>& plan);
/// Throws std::runtime_error for any other text.
std::vector<PlannedLength> plan_from_json(const std::string& text);

}  // namespace gateloop::training
