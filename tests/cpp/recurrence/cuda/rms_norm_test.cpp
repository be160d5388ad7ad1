// The norm of rows as the CUDA kernels compute it, on the CPU, against its definition.
#include <cstdio>
#include <numeric>
#include <string>
#include <type_traits>

#include "../rms_norm_case.h"
#include "host_grid.h"
#include "recurrence/cuda/rms_norm-inl.h"

namespace gateloop::testing::cuda {
namespace {

using recurrence::RmsNorm;
using recurrence::RmsNormBackward;
using rms_norm::Case;

/// All blocks of a launch, one after the other, and their threads in turn or shuffled. Blocks share
/// nothing while they run.
template <template <class, class, class> class Block, class Tile, class Op>
void run_blocks(const Op& op, std::int64_t count, const Order& order, Traffic* traffic) {
  using Body = Block<Op, Tile, HostMemory>;
  std::mt19937_64 random(order.seed);
  std::vector<std::int64_t> blocks(static_cast<std::size_t>(count));
  std::iota(blocks.begin(), blocks.end(), std::int64_t{0});
  std::vector<std::size_t> in_turn(Tile::kThreads);
  std::iota(in_turn.begin(), in_turn.end(), std::size_t{0});
  if (order.shuffle_threads) std::shuffle(blocks.begin(), blocks.end(), random);
  const auto shared = std::make_unique<typename Body::Shared>();
  std::vector<typename Body::Thread> threads(Tile::kThreads);
  for (const std::int64_t block : blocks) {
    HostMemory::Block memory;
    Body body(op, *shared, HostMemory(memory, {}, traffic));
    // Shared memory and registers begin with anything: here with numbers that are none.
    std::memset(static_cast<void*>(shared.get()), 0xFF, sizeof *shared);
    std::memset(static_cast<void*>(threads.data()), 0xFF, threads.size() * sizeof threads[0]);
    for (int i = 0; i < Tile::kThreads; ++i) {
      threads[i].lane = i % Tile::kLanes;
      threads[i].row = i / Tile::kLanes;
    }
    for (NormPhase phase = NormPhase::kBegin; phase != NormPhase::kDone;) {
      if (order.shuffle_threads) std::shuffle(in_turn.begin(), in_turn.end(), random);
      run_threads(memory, in_turn, traffic,
                  [&](std::size_t i) { body.run(phase, block, threads[i]); });
      const NormPhase next = body.after(phase, threads[0]);
      for (const auto& thread : threads) {
        if (body.after(phase, thread) != next) throw std::logic_error("threads part ways");
      }
      phase = next;
    }
  }
}

/// A whole operation as the device runs it.
template <class Params>
void run_on_host(const Params& p, const Order& order, Traffic* traffic) {
  visit(p, [&]<class Tile, class Op>(Op op) {
    // Exactly of the size given, and full of NaN.
    const Scratch scratch(norm_scratch(op));
    std::fill_n(static_cast<std::byte*>(scratch.get()), norm_scratch(op), std::byte{0xFF});
    op.sums = static_cast<decltype(op.sums)>(scratch.get());
    run_blocks<NormBlock, Tile>(op, op.blocks, order, traffic);
    if constexpr (is_norm_backward<Params>) {
      const auto sums = norm_sums<Tile>(op, p.dgain);
      run_blocks<NormSumsBlock, NormSumsTile>(sums, div_up(sums.positions, NormSumsTile::kLanes),
                                              order, traffic);
    }
  });
}

/// While it lives, execute() of the norm and its adjoint runs the bodies of their CUDA kernels.
class OnHost {
 public:
  explicit OnHost(const Order& order = {}, Traffic* forward = nullptr,
                  Traffic* backward = nullptr) {
    replacement<RmsNorm> = [=](const auto& p) { run_on_host(p, order, forward); };
    replacement<RmsNormBackward> = [=](const auto& p) { run_on_host(p, order, backward); };
  }
  ~OnHost() {
    replacement<RmsNorm> = nullptr;
    replacement<RmsNormBackward> = nullptr;
  }
  OnHost(const OnHost&) = delete;
  OnHost& operator=(const OnHost&) = delete;
};

constexpr Order kShuffled{.shuffle_threads = true, .seed = 11};

/// Widths around vectors, warps and the limits of every size.
TEST(CudaRmsNorm, AndItsAdjointEqualTheDefinition) {
  const OnHost kernels(kShuffled);
  constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {
      {1, 1},    {3, 0},    {0, 5},    {5, 7},     {3, 64},   {4, 65},
      {128, 3},  {129, 31}, {1, 512},  {300, 129}, {7, 768},  {6, 1536},
      {6, 1537}, {6, 2048}, {5, 4097}, {5, 8192},  {5, 8200}, {5, 16392}};
  for (const DType dtype : kRealDTypes) {
    for (const auto& [rows, columns] : kShapes) {
      rms_norm::check({.dtype = dtype, .rows = rows, .columns = columns});
    }
  }
}

/// Rows of vectors that are not aligned get the bits of those that are.
TEST(CudaRmsNorm, SameBitsInAnyOrderAndAlignment) {
  for (const DType dtype : kRealDTypes) {
    for (const std::int64_t columns : {5, 96, 1544, 4104, 16392}) {
      Case c{.dtype = dtype, .rows = columns > 5000 ? 5 : 37, .columns = columns};
      const auto in_turn = [&] {
        const OnHost kernels;
        return rms_norm::run(c);
      }();
      const OnHost kernels(kShuffled);
      rms_norm::expect_same(in_turn, rms_norm::run(c), describe(c));
      c.layout = Layout::kMisaligned;
      const auto misaligned = rms_norm::run(c);
      rms_norm::check(c, misaligned);
      rms_norm::expect_same(in_turn, misaligned, describe(c));
    }
  }
}

/// More rows than blocks take at once, so that every block takes several in turns.
TEST(CudaRmsNorm, TakesRowsInTurns) {
  const OnHost kernels(kShuffled);
  for (const DType dtype : kRealDTypes) {
    rms_norm::check({.dtype = dtype, .rows = 132 * 6 * 4 * 2 + 1, .columns = 9});  // size 0
  }
  rms_norm::check({.dtype = DType::kFloat64, .rows = 132 * 8 + 3, .columns = 385});  // size 1
  for (const std::int64_t columns : {1032, 2056}) {  // size 2, and wider
    rms_norm::check({.dtype = DType::kFloat64, .rows = 132 * 3 + 1, .columns = columns * 2});
  }
}

TEST(CudaRmsNorm, RefusesWhatItDoesNotTake) {
  const auto refuses = []<class Params>(Params p) {
    const auto ignore = []<class Tile>(const auto&) {};
    p.dtype = DType::kComplex64;
    EXPECT_THROW(visit(p, ignore), std::invalid_argument);
    p.dtype = static_cast<DType>(17);
    EXPECT_THROW(visit(p, ignore), std::invalid_argument);
    p.dtype = DType::kFloat32;
    p.rows = -1;
    EXPECT_THROW(visit(p, ignore), std::invalid_argument);
  };
  refuses(RmsNorm());
  refuses(RmsNormBackward());
}

/// `whole`: rows begin on sectors; else two accesses share one.
void expect_one_pass(const Traffic& t, std::int64_t least, bool whole, const std::string& what) {
  const double bytes = static_cast<double>(t.read + t.written) / static_cast<double>(least);
  const double sectors = static_cast<double>(t.sectors) / static_cast<double>(t.least_sectors);
  EXPECT_GE(bytes, 1) << what;
  EXPECT_LE(bytes, 1.1) << what;
  if (whole) {
    EXPECT_LE(sectors, 1.1) << what;
  }
  std::printf("%-32s bytes %.3f of inputs + outputs, sectors %.3f of the least\n", what.c_str(),
              bytes, sectors);
}

/// As many turns as training has, 65536 rows shared by the blocks of the table, or somewhat fewer;
/// a row of one vector a thread.
TEST(CudaRmsNorm, ReadsInputsOnceInWholeSectors) {
  if (kSanitized) GTEST_SKIP() << "the counts are the same and take minutes";
  const auto count = [](DType dtype, std::int64_t rows, std::int64_t columns,
                        const std::string& what) {
    Traffic forward, backward;
    {
      const OnHost kernels({}, &forward, &backward);
      rms_norm::run({.dtype = dtype, .rows = rows, .columns = columns});
    }
    const auto number = static_cast<std::int64_t>(recurrence::cpu::storage_bytes(dtype));
    const std::int64_t array = rows * columns * number, row = columns * number;
    const std::string name = testing::name(dtype) + " " + what;
    expect_one_pass(forward, 2 * array + row, row % 32 == 0, name);
    expect_one_pass(backward, 3 * array + 2 * row, row % 32 == 0, name + " backward");
  };
  for (const DType dtype : kRealDTypes) {
    const auto number = static_cast<std::int64_t>(recurrence::cpu::storage_bytes(dtype));
    count(dtype, 24576, 512 / number, "warps");
  }
  count(DType::kBFloat16, 24576, 255, "odd");
  count(DType::kFloat32, 12288, 1024, "4 warps");
}

}  // namespace
}  // namespace gateloop::testing::cuda
