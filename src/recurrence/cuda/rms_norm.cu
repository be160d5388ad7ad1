// y = x / max(‖x‖, ε) √columns gain and its adjoint.
#include "recurrence/cuda/launch.cuh"
#include "recurrence/cuda/rms_norm-inl.h"

namespace gateloop::recurrence::cuda {
namespace {

#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 90;  // of no meaning on the host
#endif

template <class Tile, class Op>
__global__ void __launch_bounds__(Tile::kThreads, norm_blocks_held(Tile::kBlocks, kArchitecture))
    norm_kernel(const __grid_constant__ Op op) {
  using Block = NormBlock<Op, Tile, DeviceMemory>;
  __shared__ typename Block::Shared shared;
  Block block(op, shared, DeviceMemory{});
  typename Block::Thread thread;
  thread.lane = static_cast<int>(threadIdx.x);
  thread.row = static_cast<int>(threadIdx.y);
  block.run(NormPhase::kBegin, blockIdx.x, thread);
  while (thread.turn < op.turns) {
    block.run(NormPhase::kLoad, blockIdx.x, thread);
    __syncwarp();
    if constexpr (Block::kWarps > 1) {
      block.run(NormPhase::kFold, blockIdx.x, thread);
      __syncthreads();
    }
    block.run(NormPhase::kFinish, blockIdx.x, thread);
  }
  if constexpr (Block::kMerges) {
    while (thread.merged < Block::kRows) {
      block.run(NormPhase::kMerge, blockIdx.x, thread);
      __syncthreads();
    }
  }
}

template <class Tile, class Op>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    norm_sums_kernel(const __grid_constant__ Op op) {
  using Block = NormSumsBlock<Op, Tile, DeviceMemory>;
  __shared__ typename Block::Shared shared;
  Block block(op, shared, DeviceMemory{});
  typename Block::Thread thread{static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y)};
  block.run(NormPhase::kLoad, blockIdx.x, thread);
  __syncthreads();
  block.run(NormPhase::kFinish, blockIdx.x, thread);
}

template <class Params>
std::size_t scratch_of_norm(const Params& p) {
  std::size_t bytes = 0;
  visit(p, [&]<class Tile, class Op>(const Op& op) { bytes = norm_scratch(op); });
  return bytes;
}

template <class Params>
void run_norm(const char* name, const Params& p, const Context& context) {
  visit(p, [&]<class Tile, class Op>(Op op) {
    const OnDevice device(context.device, name);
    op.sums = static_cast<decltype(op.sums)>(context.scratch);
    launch(name, norm_kernel<Tile, Op>, op.blocks, dim3(Tile::kLanes, Tile::kRows), context, op);
    if constexpr (is_norm_backward<Params>) {
      const auto sums = norm_sums<Tile>(op, p.dgain);
      launch(name, norm_sums_kernel<NormSumsTile, std::remove_const_t<decltype(sums)>>,
             div_up(sums.positions, NormSumsTile::kLanes),
             dim3(NormSumsTile::kLanes, NormSumsTile::kRows), context, sums);
    }
  });
}

}  // namespace

std::size_t scratch_bytes(const RmsNorm& p) { return scratch_of_norm(p); }
std::size_t scratch_bytes(const RmsNormBackward& p) { return scratch_of_norm(p); }

void run(const RmsNorm& p, const Context& context) { run_norm("RmsNorm", p, context); }
void run(const RmsNormBackward& p, const Context& context) {
  run_norm("RmsNormBackward", p, context);
}

}  // namespace gateloop::recurrence::cuda
