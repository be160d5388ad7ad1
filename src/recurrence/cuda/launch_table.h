#pragma once

/// Shape of the blocks of every kernel.
///
/// Of float32 and 16-bit numbers measured on an H100: 132 SMs, 64 K registers and 2048 threads
/// each, copies at 3.0 TB/s. Chosen from 4 to 12 shapes each, at (8, 8192, 1536) and (1, 65536,
/// 1536): the fastest that keeps everything in registers. Of float64 and complex numbers estimated
/// by the same means:
/// - Little's law gives 3.35 TB/s x 700 ns = 2.3 MB in flight, 18 KB an SM. A thread loads all
///   its steps at once: 256 threads of 16 steps of two float32 sequences are 32 KB, one block.
///   A second block loads while the first looks back or stores; so two blocks an SM at least.
/// - A warp's access is a row of 32 lanes of at least 4 bytes, a cache line: 16-bit numbers go in
///   pairs of channels.
/// - A carry is 3 states of 4 bytes a channel, written once and read once or a few times. Beside a
///   chunk of 64 steps of 12 bytes (LinearRecurrence, float32) that is some 3 %. Long chunks make a
///   single long sequence faster, because its carry passes from chunk to chunk.
/// - Registers: what a thread keeps of its steps, and some 50 more, at most 65536 / (threads x
///   blocks an SM). `registers` and `shared_bytes` are bounds to which a test holds the compiler.
#include <algorithm>
#include <cstddef>

namespace gateloop::recurrence::cuda {

struct Launch {
  int lanes, rows, steps, channels;
  int blocks;  // an SM holds at least
  constexpr int threads() const { return lanes * rows; }
  constexpr int registers() const { return 65536 / (threads() * blocks) / 8 * 8; }
  /// 228 KB an SM, of which every block costs 1 KB more than it has; static memory ends at 48 KB.
  constexpr int shared_bytes() const { return std::min(48 * 1024, 228 * 1024 / blocks - 1024); }
};

/// By the bytes of one number as stored and of one state.
constexpr int channels_of(std::size_t storage) { return storage == 2 ? 2 : 1; }

/// GB/s on the H100, (8, 8192, 1536), in float32 and bfloat16: linear forward 2862 and 2407,
/// backward 2788 and 2140; polar 2841 and 2104, 2546 and 1790; simple 2851 and 2668, 2810 and 2169.
constexpr Launch linear_launch(std::size_t storage, std::size_t state) {
  return {32, 8, state == 16 ? 8 : 16, channels_of(storage), state == 4 && storage == 4 ? 3 : 2};
}
constexpr Launch linear_backward_launch(std::size_t storage, std::size_t state) {
  if (storage == 2) return {32, 8, 8, 2, 3};
  return {32, 8, state == 16 ? 4 : state == 8 ? 8 : 16, 1, 2};
}
constexpr Launch polar_launch(std::size_t storage, std::size_t) {
  return {32, 8, storage == 4 ? 16 : 8, channels_of(storage), 2};
}
/// A step of a channel takes 10 registers. Pairs of channels leave room for 4 steps, and are slower
/// than 16-bit accesses one by one: 1715 GB/s.
constexpr Launch polar_backward_launch(std::size_t storage, std::size_t) {
  return {32, 8, storage == 8 ? 4 : 8, 1, 2};
}
constexpr Launch simple_launch(std::size_t storage, std::size_t) {
  if (storage == 4) return {32, 16, 8, 1, 2};
  return {32, 8, storage == 2 ? 16 : 8, channels_of(storage), 2};
}
constexpr Launch simple_backward_launch(std::size_t storage, std::size_t) {
  return {32, 8, storage == 4 ? 16 : storage == 2 ? 8 : 4, channels_of(storage), 2};
}

/// One step of every sequence, for decoding: no chunk, no carry, no scratch. Four warps a block:
/// an SM holds 32 blocks and 64 warps.
constexpr Launch step_launch(std::size_t storage, std::size_t) {
  return {128, 1, 1, channels_of(storage), 8};
}

// ---------------------------------------------------------------- norms

/// Rows of a norm. Here `lanes` threads share a row, and a block has `rows` of them at a time. A
/// thread has `steps` vectors of 16 bytes, `channels` numbers each: 4 registers an array, 8 for the
/// sums of a gradient of 16-bit numbers. The size is the smallest whose registers hold a row:
///                      forward           backward
///   0: a warp a row    3 KB              3 KB     (1536 16-bit numbers, 768 float32)
///   1: 4 warps a row   8 KB              8 KB     (float32: 2048)
///   2: 8 warps a row   32 KB             16 KB    (float32: 8192 and 4096)
/// Size 3 is for wider rows, which it reads twice, some vectors at a time.
inline constexpr int kNormSizes = 3;  // that hold a row
constexpr int norm_channels(std::size_t storage) { return static_cast<int>(16 / storage); }

/// x and the gain, 48 registers, 32 and 64; 16-bit numbers take some more as they are widened.
/// Bytes in flight an SM, of rows that fill their threads, where 18 KB are enough: at least 20
/// warps x 3 KB = 60 KB, 6 blocks x 8 KB = 48 KB, 2 x 32 KB = 64 KB, 2 x 8 KB.
constexpr Launch norm_launch(int size, std::size_t storage) {
  const int channels = norm_channels(storage);
  const bool half = storage == 2;
  if (size == 0) return {32, 4, 6, channels, half ? 5 : 6};
  if (size == 1) return {128, 1, 4, channels, half ? 6 : 8};
  if (size == 2) return {256, 1, 8, channels, 2};
  return {256, 1, 2, channels, half ? 2 : 3};
}
/// x, dy, the gain and the sums of its gradient: 120 registers of 16-bit numbers and 96 of others,
/// then 80 and 64. Bytes in flight: 12 warps x 6 KB = 72 KB, 4 blocks x 16 KB, 2 x 32 KB, 2 x 16.
constexpr Launch norm_backward_launch(int size, std::size_t storage) {
  const int channels = norm_channels(storage);
  if (size == 0) return {32, 4, 6, channels, 3};
  if (size == 1) return {128, 1, 4, channels, 4};
  return {256, 1, size == 2 ? 4 : 2, channels, 2};
}
/// Blocks that share all rows, whatever the device: the order of the gain's sums depends on it. One
/// wave of an H100. 65536 rows of 1536 bfloat16 numbers, 604 MB, then have 396 partial sums of 6
/// KB, written and read: 4.9 MB, 0.8 %.
constexpr int norm_blocks(int blocks_an_sm) { return 132 * blocks_an_sm; }

/// Blocks an SM for which the compiler leaves registers to a norm. The table is tuned for sm_90;
/// sm_80 and sm_100 would spill some of a row.
constexpr int norm_blocks_held(int blocks, int architecture) {
  if (architecture == 90) return blocks;
  return blocks > 2 ? blocks - 2 : 1;
}

/// Adds the partial sums: a thread every 32nd of a column, so 13 loads of 396.
constexpr Launch norm_sums_launch() { return {32, 32, 1, 1, 1}; }

}  // namespace gateloop::recurrence::cuda
