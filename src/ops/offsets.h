#pragma once

#include <cstdint>
#include <vector>

#include "ops/internal.h"

namespace gateloop::ops {

/// cu_seqlens (N + 1) as the host reads it, empty where absent. Throws c10::Error naming `op` for
/// values that do not cut `time` steps into sequences.
std::vector<std::int64_t> sequence_offsets(const char* op, const OptionalTensor& cu_seqlens,
                                           std::int64_t time);

}  // namespace gateloop::ops
