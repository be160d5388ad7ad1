#pragma once

/// A recurrence over blocks of time, one a process: docs/math.md, "One sequence over many
/// processes".
#include <ATen/ATen.h>

#include <memory>
#include <tuple>

#include "distributed/local_recurrence.h"
#include "distributed/time_block.h"

namespace gateloop::distributed {

/// -> (y of this block, the final state of the whole). `initial_state` is read in the first block.
/// Differentiable once; `op` is named in the error of a second time.
std::tuple<at::Tensor, at::Tensor> time_sharded(const char* op,
                                                std::unique_ptr<LocalRecurrence> recurrence,
                                                const TimeBlock& block, at::TensorList sequences,
                                                const OptionalTensor& initial_state);

}  // namespace gateloop::distributed
