#pragma once

/// Many tokens at once: each stage is blocked products over all rows, the threads meeting after
/// each of its parts.
#include <cstdint>
#include <span>

#include "recurrence/scratch.h"
#include "runtime/network.h"
#include "runtime/rows.h"
#include "runtime/state.h"

namespace gateloop::runtime {

class ManyRows {
 public:
  explicit ManyRows(const Network& network) : network_(network) {}

  /// Advances the state by tokens. Those of packed sequences lie one after another, else token (b,
  /// t) is tokens[b stride + t]. logits: (rows, num_tokens), one after another if packed; else
  /// sequence b begins at b `logits_stride`. If `last_only` (B, num_tokens) after the last step of
  /// each sequence that has steps.
  struct Call {
    const std::int64_t* tokens = nullptr;
    std::int64_t stride = 0;
    Runs runs;
    bool last_only = false;
    float* logits = nullptr;
    std::int64_t logits_stride = 0;

    std::int64_t token(std::int64_t row) const {
      if (runs.packed()) return tokens[row];
      return tokens[row / runs.time * stride + row % runs.time];
    }
  };
  void run(const Call& call, StateData& state, const float* ones,
           const recurrence::Executor& executor);

 private:
  struct Pass;
  void project(const Stage& stage, const Pass& pass, float* to, std::int64_t stride);
  void mix(const Stage& stage, const Pass& pass, StateData& state, const float* ones);
  /// The logits of all rows, or of the last of each sequence.
  void read_out(const Stage& stage, const Pass& pass, const Call& call);
  void read_out_all(const Stage& stage, const Pass& pass, const Call& call);

  const Network& network_;
  recurrence::Scratch rows_, mixing_, next_, products_, logits_;
};

}  // namespace gateloop::runtime
