#pragma once

/// One token of one sequence. Every thread computes its share of each stage, and inputs for itself:
/// a stage costs one barrier of the threads, and every weight is read once.
#include <cstdint>

#include "recurrence/scratch.h"
#include "runtime/network.h"
#include "runtime/state.h"

namespace gateloop::runtime {

class OneRow {
 public:
  OneRow(const Network& network, int threads);

  /// Advances the state, of one sequence, by the token. logits: (num_tokens).
  void step(std::int64_t token, StateData& state, const float* ones,
            const recurrence::Executor& executor, float* logits);

 private:
  struct Unit;
  Unit unit(std::int64_t index) const;
  void run_stage(const Stage& stage, std::int64_t index, StateData& state, const float* ones,
                 float* logits) const;

  const Network& network_;
  const int units_;
  recurrence::Scratch rows_, phases_, mixing_;
  std::int64_t mixing_bytes_ = 0;  // of a unit
};

}  // namespace gateloop::runtime
