#pragma once

/// Every tunable of the CPU kernels, with the measurement that chose it.
/// Machine: AMD EPYC (Zen 5), 2 cores, 48 KiB L1d, 1 MiB L2, 32 MiB L3, float32 unless said.
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace gateloop::recurrence::cpu {

/// Tiles begin at multiples of a cache line, so two threads never write one line.
inline constexpr std::int64_t kCacheLine = 64;

/// Carry of one channel tile; it stays in L1 beside the rows that stream past. Wide tiles read long
/// runs of memory, one row after the other: LinearRecurrence (1, 65536, 512) on one thread took 8
/// ms with rows of 512 channels and, visiting 4 steps of 16 channels at a time, 17 ms.
inline constexpr std::int64_t kTileCarryBytes = 8192;

/// Rows prefetched ahead where a tile is narrower than the row, so that memory is read with gaps
/// that end every hardware prefetch. (1, 65536, 512) in tiles of 256 channels on one thread, 0 -> 2
/// rows: LinearRecurrence 17.5 -> 12.3 ms, PolarGateLoop 40 -> 26, SimpleGateLoop 42 -> 20.
inline constexpr std::int64_t kTileRowsAhead = 2;
/// And where it is not: PolarGateLoop 23 -> 17 ms; the others gain nothing.
inline constexpr std::int64_t kPolarGateLoopRowsAhead = 1;

/// A backward unit keeps the states and gates of one block of saved states here; it must stay in
/// L2. PolarGateLoopBackward (1, 65536, 512), states saved every 64 steps: 221 ms with 64 KiB, 150
/// with 128, 109 with 256, 65 with 1024; every 16 steps, where 256 KiB hold as wide a tile, 65 ms.
inline constexpr std::int64_t kStashBytes = 256 * 1024;

/// Calls with fewer (B, T, D) elements run on the calling thread: waking a pool takes some 5 us.
inline constexpr std::int64_t kInlineElements = 16 * 1024;

/// Rows whose part of a gain's gradient is summed together, whatever the number of threads: the
/// sums are a 128th as many as the rows. Not measured.
inline constexpr std::int64_t kNormRows = 128;
inline std::int64_t norm_groups(std::int64_t rows) {
  return (std::max<std::int64_t>(0, rows) + kNormRows - 1) / kNormRows;
}

/// How often a thread that is done with its part of a phase polls the others before it takes over
/// their work or yields its core: some 20 us, while phases take 5 to 100. Not measured: it matters
/// only where threads share cores.
inline constexpr std::int64_t kPhaseSpins = 20'000;

/// Rows that a step leaves there: see PolarGateLoopStash and SimpleStash.
inline constexpr std::int64_t kPolarGateLoopStashPlanes = 6;
inline constexpr std::int64_t kSimpleStashPlanes = 3;

/// Outputs of more bytes than this bypass the cache (about one last-level cache). Of 128 MB, an
/// elementwise pass took 11.6 ms with ordinary stores and 8.3 with streaming ones; of 2 MB, that
/// the next operation finds in cache, both took the same.
inline constexpr std::int64_t kStreamBytes = 32 << 20;

/// Time is cut into blocks only where batch × cache lines of channels is below kCutLines and time
/// at least kCutMinSteps: a rule on the shape alone, because the cut changes rounding. The cut
/// reads its input twice, the second time from cache. (1, 2^20, 8) on one thread and on two:
/// LinearRecurrence 3.5 and 2.4 ms, PolarGateLoop 17.4 and 9.3, its adjoint 31.8 and 17.3.
inline constexpr std::int64_t kCutLines = 4;
/// Not measured: some 20 us of LinearRecurrence on one thread, a few times the waking of a pool.
inline constexpr std::int64_t kCutMinSteps = 4096;
/// A multiple of kSavedStateBlock. SimpleGateLoop (1, 2^20, 8) on two threads and on
/// one, with blocks of 256: 5.7 and 11.5 ms; of 1024: 5.3 and 10.2.
inline constexpr std::int64_t kCutBlockSteps = 1024;
/// The widest carry that is cut: below kCutLines lines of half precision, complex float32 states.
inline constexpr std::int64_t kCutRowBytes = (kCutLines - 1) * kCacheLine / 2 * 8;

/// Cache lines of one sequence in a block of a pipeline; with those of the other sequences they
/// stay in L2. (1, 65536, 512) on two threads of a Zen 4, where a tile would be half a row, with
/// blocks of 16, 32 and 64 steps: LinearRecurrence 13.5 -> 12.0, 10.5, 10.5 ms, its adjoint 20 ->
/// 20, 18.5, 18.5, that of PolarGateLoop 59 -> 52, 51.5, 50.5, that of SimpleGateLoop 39 ->
/// 31, 30.7, 29.
inline constexpr std::int64_t kPipelineLines = 2048;

/// Columns of small matrices come in groups of so many: one vector of the widest target (AVX-512).
inline constexpr std::int64_t kTileColumns = 16;

/// GateLoop of heads whose states have at most so many numbers, keys × values, goes step by step,
/// and in chunks beyond: complex states, or with a transition a key. 512 channels, 1,024 steps, one
/// thread of a Zen 4, in chunks -> step by step, forward and backward: heads of 16 5.5 and 12.2 ms
/// -> 2.6 and 8.5, of 32 5.5 and 11.4 -> 3.8 and 9.5, of 48 4.8 and 10.7 -> 3.9 and 11.2.
inline constexpr std::int64_t kStepwiseNumbers = 1024;
/// Real states with a transition a head: heads of 64 4.2 and 9.4 -> 3.0 and 8.8, of 128 5.9
/// and 12.4
/// -> 5.3 and 16.0.
inline constexpr std::int64_t kStepwiseRealNumbers = 4096;
/// At most so many keys are in registers at once: complex states of 8 fill half of AVX-512's.
inline constexpr std::int64_t kStepBlockKeys = 8;

/// A product of many rows: rows of weights multiplied with a panel of x in registers, half as many
/// where there are 16; the tile of y that a thread fills, (rows of weights, rows of x); and the
/// columns summed at a time. A panel of 16 rows and 512 columns is 32 KiB, 128 rows of them half of
/// a 512 KiB L2 cache. On one thread of a Zen 3 (1024, 2048, 512) takes 31 ms, 68 GFLOP/s, and
/// oneDNN 2.6 with packed weights 30; of 64 rows 2.2 ms, and oneDNN 3.3. With the panel in the
/// inner loop's L1 and weights widened a tile at a time instead, depths 256 and 512: 34 and 32 ms.
/// With 32 registers 12 rows instead of 6: 1,024 tokens in bfloat16 75 ms -> 70 (Zen 5).
inline constexpr std::int64_t kMicroRows = 12;
inline constexpr std::int64_t kProductTileRows = 48;
inline constexpr std::int64_t kProductBlockRows = 128;
/// 512 products of int8 with int16 in one lane stay below 2^31.
inline constexpr std::int64_t kProductDepth = 512;
/// Between sums of one row of weights and the next: at a multiple of 512 bytes they share few sets
/// of L1. Writing y took 11 per cent of a step of 64 sequences in bfloat16 (Zen 4), and takes 4.
inline constexpr std::int64_t kProductSumsStride = kProductBlockRows + 16;
/// Up to so many rows are dot products: a panel would be mostly empty.
inline constexpr std::int64_t kProductDotRows = 4;
/// Rows of weights whose dot products are summed together.
inline constexpr std::int64_t kDotTogether = 4;
/// Weights are prefetched so many bytes ahead of dot products, across the ends of rows, where a
/// matrix is large. Tokens a second of a model of enwik8's size, two threads: float32 740 -> 860,
/// bfloat16 1,130 -> 1,650, int8 3,690 -> 4,200. Small matrices are not: threads would fetch each
/// other's parts, and the 33,000 tokens of `quick` were 28,000.
inline constexpr std::int64_t kDotBytesAhead = 8192;
inline constexpr std::int64_t kDotBytesPrefetched = 1 << 18;

}  // namespace gateloop::recurrence::cpu
