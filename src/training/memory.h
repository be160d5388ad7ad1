#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "gateloop/training.h"

namespace gateloop::training {

/// Upper estimate of what one sequence keeps alive during a training step.
std::int64_t activation_bytes_per_row(const RunConfig& config);

/// Sequences to run together. All that a process has of a step, `rows`, if their activations fit
/// half of `available` bytes; else at most `batch`. Fewer and larger operators are faster; the rest
/// of the memory stays free for the page cache and others.
std::int64_t choose_rows_per_pass(const RunConfig& config, std::int64_t rows,
                                  std::int64_t available);

/// Replicas of the model for a pass of `rows` sequences on the CPU: one for each thread, if all get
/// as many rows, else one. A replica has a gradient of its own, which grows while what its rows
/// keep is freed. It must not take more.
std::int64_t choose_replicas(const RunConfig& config, std::int64_t rows);

/// Which options make a pass smaller, where one of rows_per_pass sequences is likely to take more
/// than `available` bytes. 0: the system does not say how many there are.
std::optional<std::string> memory_advice(const RunConfig& config, std::int64_t available);

}  // namespace gateloop::training
