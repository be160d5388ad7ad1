#pragma once

/// What sequences carry from token to token, and its file.
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "gateloop/runtime.h"
#include "runtime/rows.h"

namespace gateloop::runtime {

/// Keys and values, (B, heads, capacity, dim_head) each: step t at t % window. Copies of a state
/// share them: the first that appends goes on in place, the others copy.
struct StepCache {
  std::int64_t rows = 0;  ///< B heads
  std::int64_t dim_head = 0;
  std::vector<float> keys, values;
  std::atomic<std::int64_t> written = 0;  ///< tokens of all sequences that some state has read

  std::int64_t capacity() const { return rows == 0 ? 0 : std::ssize(keys) / (rows * dim_head); }
};

/// Of one layer, in float32; what the layer has not is empty.
struct LayerState {
  std::vector<float> simple;         ///< (B, dim)
  std::vector<float> recurrence;     ///< (B, dim_inner, parts), or (B, heads, parts, d, d)
  std::shared_ptr<StepCache> steps;  ///< none before the first step
};

struct StateData {
  std::uint64_t digest = 0;  ///< of the model that it belongs to; 0 for the start of a sequence
  std::vector<std::int64_t> positions;  ///< (B) tokens read
  std::vector<LayerState> layers;

  std::int64_t batch() const { return std::ssize(positions); }
  /// Tokens read of the longest sequence, and of all together.
  std::int64_t longest() const;
  std::int64_t total() const;
  std::int64_t bytes() const;  ///< of memory
};

/// The state before the first token of `batch` sequences.
StateData initial_state(const model::ModelSpec& spec, std::uint64_t digest, std::int64_t batch);

/// Room for the keys and values of these rows, which no other state reads or writes: at least twice
/// as much as before where there is too little.
void reserve_steps(const model::ModelSpec& spec, StateData& state, const Runs& runs);

/// All its sequences, with no more room for keys and values than they take.
StateData compact(const StateData& state);

/// What keeps it from being a state of this model; "" where nothing does.
std::string state_problem(const model::ModelSpec& spec, std::uint64_t digest,
                          const StateData& state);

}  // namespace gateloop::runtime
