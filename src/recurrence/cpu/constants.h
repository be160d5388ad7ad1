#pragma once

/// Every tunable of the CPU kernels, with the measurement that chose it.
/// Machine: AMD EPYC (Zen 5), 2 cores, 48 KiB L1d, 1 MiB L2, 32 MiB L3, float32 unless said.
#include <cstddef>
#include <cstdint>

namespace gateloop::recurrence::cpu {

/// Tiles begin at multiples of a cache line, so two threads never write one line.
inline constexpr std::int64_t kCacheLine = 64;

/// Carry of one channel tile; it stays in L1 beside the rows that stream past.
inline constexpr std::int64_t kTileCarryBytes = 8192;

/// Time steps done on one vector of channels before the next vector is visited.
inline constexpr std::int64_t kStepsPerVisit = 1;

/// A backward unit keeps the states and gates of one checkpoint block here; it must stay in L2.
inline constexpr std::int64_t kStashBytes = 256 * 1024;

/// Calls with fewer (B, T, D) elements run on the calling thread: waking a pool takes some 5 us.
inline constexpr std::int64_t kInlineElements = 16 * 1024;

/// Outputs of more bytes than this bypass the cache (about one last-level cache).
inline constexpr std::int64_t kStreamBytes = 32 << 20;

/// Time is cut into blocks only where batch × cache lines of channels is below kCutLines and time
/// at least kCutMinSteps: a rule on the shape alone, for the cut changes the rounding.
inline constexpr std::int64_t kCutLines = 4;
inline constexpr std::int64_t kCutMinSteps = 4096;
/// A multiple of kCheckpointBlock.
inline constexpr std::int64_t kCutBlockSteps = 1024;
/// Blocks whose two passes follow each other while their rows are in the last-level cache.
inline constexpr std::int64_t kPanelBlocks = 32;

}  // namespace gateloop::recurrence::cpu
