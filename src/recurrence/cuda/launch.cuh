#pragma once

/// Launches: the bodies as kernels, the device's memory, errors by name.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cuda/atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "gateloop/recurrence_cuda.h"
#include "recurrence/cuda/plan-inl.h"
#include "recurrence/cuda/scan-inl.h"

namespace gateloop::recurrence::cuda {

/// What one instruction moves: the compiler splits stores of structs.
template <std::size_t kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <std::size_t kBytes>
using Word = typename WordOf<kBytes>::type;

/// Global memory. Arrays go through L1; what other blocks write while this one runs does not.
struct DeviceMemory {
  using Flag = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;
  template <class X>
  __device__ X load(const X* from) const {
    const auto word = *reinterpret_cast<const Word<sizeof(X)>*>(from);
    X value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
  template <class X>
  __device__ void store(X* to, const X& value) const {
    Word<sizeof(X)> word;
    memcpy(&word, &value, sizeof word);
    *reinterpret_cast<Word<sizeof(X)>*>(to) = word;
  }
  template <class T>
  __device__ T load_fresh(const T* from) const {
    return __ldcg(from);
  }
  __device__ unsigned acquire(unsigned* flag) const {
    return Flag(*flag).load(::cuda::memory_order_acquire);
  }
  __device__ void release(unsigned* flag, unsigned value) const {
    Flag(*flag).store(value, ::cuda::memory_order_release);
  }
  __device__ std::int64_t next(unsigned* ticket) const { return atomicAdd(ticket, 1u); }
};

template <class Tile, class Op>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    scan_kernel(const __grid_constant__ Op op, const __grid_constant__ Schedule schedule) {
  using Block = ScanBlock<Op, Tile, DeviceMemory>;
  __shared__ typename Block::Shared shared;
  Block block(op, schedule, shared, DeviceMemory{});
  typename Block::Thread thread;
  thread.lane = static_cast<int>(threadIdx.x);
  thread.row = static_cast<int>(threadIdx.y);
  const auto step = [&](Phase phase) {
    block.run(phase, blockIdx.x, thread);
    __syncthreads();
    return block.after(phase, thread);
  };
  // Written out: in a loop over phases all of a thread's steps stay alive through every turn.
  if (step(Phase::kTake) == Phase::kDone) return;
  if (step(Phase::kLoad) == Phase::kMeasure && step(Phase::kMeasure) == Phase::kPublish) {
    step(Phase::kPublish);
    step(Phase::kAnnounce);
    do step(Phase::kPoll);
    while (step(Phase::kMeasure) == Phase::kPoll);
  }
  step(Phase::kReceive);
  block.run(Phase::kFinish, blockIdx.x, thread);
}

inline void check(cudaError_t status, const char* name, const std::string& what) {
  if (status == cudaSuccess) return;
  std::string message = std::string(name) + ": " + what + ": " + cudaGetErrorString(status) + " (" +
                        cudaGetErrorName(status) + ")";
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInsufficientDriver) {
    message += "; this build has kernels for " GATELOOP_CUDA_ARCHITECTURES
               " alone: build for this device (-DCMAKE_CUDA_ARCHITECTURES), or without kernels "
               "(-DGATELOOP_CUDA=OFF)";
  }
  throw std::runtime_error(message);
}

/// Makes a device current, and again the one that was.
class OnDevice {
 public:
  OnDevice(int device, const char* name) {
    check(cudaGetDevice(&before_), name, "asking for the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), name, "choosing device " + std::to_string(device));
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Kernel, class... Arguments>
void launch(const char* name, Kernel* kernel, std::int64_t blocks, dim3 threads,
            const Context& context, const Arguments&... arguments) {
  if (blocks == 0) return;
  const std::string what =
      std::to_string(blocks) + " blocks of " + std::to_string(threads.x * threads.y) + " threads";
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string(name) + ": " + what + " are more than a launch takes");
  }
  const void* pointers[] = {&arguments...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         threads, const_cast<void**>(pointers), 0, context.stream),
        name, "launching " + what);
}

template <class Params>
std::size_t scan_scratch_bytes(const Params& p) {
  std::size_t bytes = 0;
  visit(p, [&]<class Tile, class Op>(const Op&) {
    bytes = scratch_of<typename Op::Value, Tile>(schedule_of<Tile>(p)).total;
  });
  return bytes;
}

template <class Params>
void run_scan(const char* name, const Params& p, const Context& context) {
  visit(p, [&]<class Tile, class Op>(const Op& op) {
    const OnDevice device(context.device, name);
    Schedule schedule = schedule_of<Tile>(p);
    const ScanScratch sizes = scratch_of<typename Op::Value, Tile>(schedule);
    set_scratch(schedule, sizes, context.scratch);
    if (sizes.cleared > 0) {
      check(cudaMemsetAsync(context.scratch, 0, sizes.cleared, context.stream), name,
            "clearing the flags of the look-back");
    }
    launch(name, scan_kernel<Tile, Op>, schedule.slots * schedule.tiles,
           dim3(Tile::kLanes, static_cast<unsigned>(schedule.rows)), context, op, schedule);
  });
}

}  // namespace gateloop::recurrence::cuda
