#pragma once

/// Many tokens at once: each stage is blocked products over all rows, the threads meeting after
/// each of its parts.
#include <cstdint>
#include <span>

#include "runtime/memory.h"
#include "runtime/network.h"
#include "runtime/rows.h"
#include "runtime/state.h"

namespace gateloop::runtime {

class ManyRows {
 public:
  explicit ManyRows(const Network& network) : network_(network) {}

  /// Advances the state by tokens (B, T) in some memory: token (b, t) is tokens[b stride + t].
  /// logits: (B, T, num_tokens), or (B, num_tokens) after the last step if `last_only`; sequence b
  /// begins at b `logits_stride`.
  struct Call {
    const std::int64_t* tokens = nullptr;
    std::int64_t stride = 0;
    std::int64_t time = 0;
    bool last_only = false;
    float* logits = nullptr;
    std::int64_t logits_stride = 0;
  };
  void run(const Call& call, StateData& state, const float* ones,
           const recurrence::Executor& executor);

 private:
  struct Pass;
  void project(const Stage& stage, const Pass& pass, float* to, std::int64_t stride);
  void mix(const Stage& stage, const Pass& pass, StateData& state, const float* ones);
  void read_out(const Stage& stage, const Pass& pass, const Call& call);

  const Network& network_;
  Scratch rows_, mixing_, next_, products_, logits_;
};

}  // namespace gateloop::runtime
