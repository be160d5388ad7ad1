#pragma once

/// The kernels of recurrence.h on a CUDA device, behind the same plain structs.
///
/// Every pointer of a struct is device memory, `offsets` too. Only the device reads offsets: wrong
/// values are not found; a kernel then accesses memory outside of the arrays, or waits for ever.
/// Nothing here allocates or synchronises: run() queues its work on the stream and can be captured
/// in a graph. The same call gives the same bits on every run, whatever else the device does. A
/// transition of modulus above 1 may overflow in the product over a chunk, of up to 256 steps. A
/// state that is small enough would not overflow there.
///
/// Tests run the same bodies on the CPU, and on an H100, the only GPU that has been tried.
#include <cstddef>

#include "gateloop/recurrence.h"

/// What cudaStream_t points to.
struct CUstream_st;

namespace gateloop::recurrence::cuda {

struct Context {
  /// Null: the device's default stream.
  CUstream_st* stream = nullptr;
  int device = 0;
  /// Of the size that scratch_bytes() returns, on `device`, aligned to 256 bytes as by cudaMalloc.
  /// In use until the work is done.
  void* scratch = nullptr;
};

/// 0 where every sequence is one chunk, as in decoding.
std::size_t scratch_bytes(const LinearRecurrence&);
std::size_t scratch_bytes(const LinearRecurrenceBackward&);
std::size_t scratch_bytes(const PolarGateLoop&);
std::size_t scratch_bytes(const PolarGateLoopBackward&);
std::size_t scratch_bytes(const SimpleGateLoop&);
std::size_t scratch_bytes(const SimpleGateLoopBackward&);
/// 0 forward.
std::size_t scratch_bytes(const RmsNorm&);
std::size_t scratch_bytes(const RmsNormBackward&);

/// Throws std::invalid_argument for a dtype or a shape that the operation does not take. Throws
/// std::runtime_error, with the operation and CUDA's message, where a launch fails.
void run(const LinearRecurrence&, const Context&);
void run(const LinearRecurrenceBackward&, const Context&);
void run(const PolarGateLoop&, const Context&);
void run(const PolarGateLoopBackward&, const Context&);
void run(const SimpleGateLoop&, const Context&);
void run(const SimpleGateLoopBackward&, const Context&);
void run(const RmsNorm&, const Context&);
void run(const RmsNormBackward&, const Context&);

}  // namespace gateloop::recurrence::cuda
