#pragma once

/// The definition of a model, in double precision and plain loops, straight from its description.
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gateloop/model.h"

namespace gateloop::test {

/// Weights by name, each contiguous.
using Weights = std::map<std::string, std::vector<double>>;

/// What products read: numbers as they are, or rounded.
enum class Inputs : std::uint8_t { kExact, kBFloat16 };

/// Logits (T, num_tokens) of one sequence of T ids.
std::vector<double> oracle_logits(const model::ModelSpec& spec, const Weights& weights,
                                  const std::vector<std::int64_t>& ids,
                                  Inputs inputs = Inputs::kExact);

}  // namespace gateloop::test
