#pragma once

/// Who computes what. Cuts a (B, T, D) recurrence into units of batch × channel tile (× time
/// block). Runs them on the executor's threads. The arithmetic is in a Kernel.
#include <cstddef>
#include <cstdint>

#include "gateloop/recurrence.h"

namespace gateloop::recurrence::cpu {

/// A run of channels of one batch entry.
struct Unit {
  std::int64_t batch, channel, channels;
};

/// Steps [begin, end) in the order of the forward scan.
struct Steps {
  std::int64_t begin, end;
};

/// A recurrence whose carry obeys c' = a c + x, channel by channel: the state h going forward, or
/// conj(a) g going back. Every carry is (channels), contiguous, in the accumulation type.
class Kernel {
 public:
  /// Does the whole work of these steps and moves `carry` across them: from begin to end, or from
  /// end to begin if the problem is an adjoint. `stash` is private to the call.
  virtual void scan(const Unit&, Steps, void* carry, void* stash) const = 0;
  /// Reads what scan will read, in the order in which it lies in memory.
  virtual void touch(const Unit&, Steps) const = 0;
  /// The same steps as one step (product, sum) of the recurrence; writes nothing else.
  virtual void aggregate(const Unit&, Steps, void* product, void* sum) const = 0;
  /// carry = product * carry + sum.
  virtual void combine(std::int64_t channels, const void* product, const void* sum,
                       void* carry) const = 0;

 protected:
  ~Kernel() = default;
};

struct Problem {
  Shape shape;
  bool adjoint = false;           // the scan runs from the last step to the first
  bool downwards = false;         // in memory it does: batches follow in the same direction
  std::size_t storage_bytes = 0;  // one real number of the sequences
  std::size_t carry_bytes = 0;    // one channel of the carry
  std::size_t stash_bytes = 0;    // scratch of a unit for each of its channels
  ConstState carry_in = nullptr;  // null: zeros
  State carry_out = nullptr;      // null: not wanted
};

std::size_t scratch_bytes(const Problem&, int threads);
void drive(const Problem&, const Kernel&, const Executor&, void* scratch);

}  // namespace gateloop::recurrence::cpu
