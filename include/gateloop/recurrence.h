#pragma once

/// The kernels of GateLoop (Katsch 2023, arXiv 2311.01927, section 3): its scans, and of the model
/// around them the norm and a whole decoding step.
///
/// The interface is one plain struct per operation: pointers, sizes, 64-bit strides in elements.
/// Kernels start no threads and allocate no memory. The caller provides both: an Executor, and
/// scratch of the size that scratch_bytes() returns. Sequences are (B, T, D) with contiguous
/// channels and any stride, of any sign, on batch and time. Results are the same bits for any
/// number of threads.
///
/// Nothing here depends on torch, Python or XLA.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace gateloop::recurrence {

/// Storage type of a sequence. bfloat16 and float16 are storage only: their state and every
/// accumulation are float32.
enum class DType : std::uint8_t {
  kFloat32,
  kFloat64,
  kComplex64,
  kComplex128,
  kBFloat16,
  kFloat16,
};

/// (B, T, D) view; strides in elements of the storage type; channels contiguous.
struct ConstSequence {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t time_stride = 0;
};
struct Sequence {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t time_stride = 0;
};

/// (B, D), or (N, D) beside Offsets, contiguous, in the accumulation type; a null pointer reads as
/// zeros and is not written.
using ConstState = const void*;
using State = void*;

/// Where N sequences of different lengths begin and end along the time of a (1, T, D) sequence: N +
/// 1 numbers, none below the one before it, the first 0 and the last T. Each has an initial and a
/// final state of its own, and gets the bits that it gets alone. Empty: one sequence a batch entry.
using Offsets = std::span<const std::int64_t>;

/// Threads lent by the host (at::parallel_for, XLA's pool, std::thread in the tests).
struct Executor {
  int threads = 1;
  /// Calls body(i) once for every i in [0, n), concurrently and in any order, and returns when all
  /// are done. Empty: a plain loop.
  std::function<void(std::int64_t n, const std::function<void(std::int64_t)>& body)> parallel_for;
};

/// States kept for the backward pass lie at the start of every block of this many time steps: a
/// sixteenth of a (B, T, D) array per state component. Short enough that a core's L2 cache holds
/// what the backward pass recomputes of a block of some 700 channels.
inline constexpr std::int64_t kSavedStateBlock = 16;
constexpr std::int64_t saved_state_count(std::int64_t time) {
  return (time + kSavedStateBlock - 1) / kSavedStateBlock;
}
/// Beside Offsets the states of sequence n, which begins at step o, lie from saved_state_count(o,
/// n) on. A sequence of L steps has at most floor(L / 16) + 1 blocks. As floor(o / 16) + floor(L /
/// 16) is at most floor((o + L) / 16), its states end before the next begin. So many states hold
/// them all.
constexpr std::int64_t saved_state_count(std::int64_t time, std::int64_t sequences) {
  return time / kSavedStateBlock + sequences;
}

struct Shape {
  std::int64_t batch = 0;
  std::int64_t time = 0;
  std::int64_t channels = 0;
};

/// h_t = a_t h_{t-1} + x_t. All sequences and states in `dtype`, but states in float32 where dtype
/// is bfloat16 or float16. `reverse` runs from the last step to the first; final_state is then the
/// state after step 0.
struct LinearRecurrence {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool reverse = false;
  ConstSequence a, x;
  ConstState initial_state = nullptr;
  Sequence h;
  State final_state = nullptr;
  Offsets offsets = {};
};

/// Adjoint of LinearRecurrence (the conjugate Wirtinger derivative, as PyTorch's):
///   g_t = dh_t + conj(a_{t+1}) g_{t+1}, g_{T+1} = dfinal_state
///   dx_t = g_t, da_t = g_t conj(h_{t-1}), dinitial_state = conj(a_1) g_1
/// `h` is the forward's output. Nullable: initial_state, dfinal_state, dh.data, dinitial_state.
struct LinearRecurrenceBackward {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool reverse = false;
  ConstSequence a, h, dh;
  ConstState initial_state = nullptr;
  ConstState dfinal_state = nullptr;
  Sequence da, dx;
  State dinitial_state = nullptr;
  Offsets offsets = {};
};

/// The fused GateLoop read for max heads (head dimension 1):
///   a_t = σ(|z_t|) z_t/|z_t| (0.5 at z = 0), h_t = a_t h_{t-1} + k_t v_t, y_t = q_t Re(h_t)
/// q, k, v, y: (B, T, D) real in `dtype` (not complex). z: (B, T, 2D), (re, im) interleaved per
/// channel; its strides count real elements. States: (B, D) complex, (re, im) pairs of the
/// accumulation type. saved_states: (B, saved_state_count(T), D) complex, contiguous, the state
/// before each block in scan order; null where no backward pass follows. Beside Offsets (1,
/// saved_state_count(T, N), D), of which some may stay unwritten.
struct PolarGateLoop {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool reverse = false;
  ConstSequence q, k, v, z;
  ConstState initial_state = nullptr;
  Sequence y;
  State final_state = nullptr;
  void* saved_states = nullptr;
  Offsets offsets = {};
};

/// Adjoint of PolarGateLoop; recomputes the states block by block from `saved_states`.
/// Nullable: dfinal_state, dinitial_state, dy.data (then zero).
struct PolarGateLoopBackward {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool reverse = false;
  ConstSequence q, k, v, z, dy;
  const void* saved_states = nullptr;
  ConstState dfinal_state = nullptr;
  Sequence dq, dk, dv, dz;
  State dinitial_state = nullptr;
  Offsets offsets = {};
};

/// The simple (real) gate: a_t = σ(z_t), h_t = a_t h_{t-1} + x_t, y_t = q_t h_t, with x_t = kv_t,
/// or (1 - a_t) kv_t when `normalize_input`. q, kv, z, y: (B, T, D) real. States and saved states
/// as in PolarGateLoop, but real.
struct SimpleGateLoop {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool reverse = false;
  bool normalize_input = false;
  ConstSequence q, kv, z;
  ConstState initial_state = nullptr;
  Sequence y;
  State final_state = nullptr;
  void* saved_states = nullptr;
  Offsets offsets = {};
};

struct SimpleGateLoopBackward {
  DType dtype = DType::kFloat32;
  Shape shape;
  bool reverse = false;
  bool normalize_input = false;
  ConstSequence q, kv, z, dy;
  const void* saved_states = nullptr;
  ConstState dfinal_state = nullptr;
  Sequence dq, dkv, dz;
  State dinitial_state = nullptr;
  Offsets offsets = {};
};

/// (B, T, H, C) view; strides in elements of the storage type; channels contiguous.
struct ConstHeads {
  const void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t time_stride = 0;
  std::int64_t head_stride = 0;
};
struct Heads {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t time_stride = 0;
  std::int64_t head_stride = 0;
};

struct HeadsShape {
  std::int64_t batch = 0;
  std::int64_t time = 0;
  std::int64_t heads = 0;
  std::int64_t keys = 0;
  std::int64_t values = 0;
};

/// Steps between two saved states. Heads of large states are computed in chunks of so many steps,
/// as matrix products: where every key has transitions of its own, pairs of steps cost more, and
/// chunks are shorter.
constexpr std::int64_t gate_loop_chunk(bool per_key) { return per_key ? 16 : 64; }
constexpr std::int64_t gate_loop_chunks(std::int64_t time, bool per_key) {
  return (time + gate_loop_chunk(per_key) - 1) / gate_loop_chunk(per_key);
}
/// Beside Offsets the chunks of sequence n, which begins at step o, count from gate_loop_chunks(o,
/// n, per_key) on; see saved_state_count.
constexpr std::int64_t gate_loop_chunks(std::int64_t time, std::int64_t sequences, bool per_key) {
  return time / gate_loop_chunk(per_key) + sequences;
}

/// What q and k become before their products (arXiv 2312.04927, section 5.1):
/// kTaylor is φ(x) = 1, x_i, x_i²/√2, x_i x_j for j < i: φ(q) · φ(k) = 1 + s + s²/2 for s = q · k.
/// The expanded rows of a chunk are all that is in memory.
enum class FeatureMap : std::uint8_t { kNone, kTaylor };
/// Features of a row of so many channels, an integer of any kind: the keys of its state.
template <class Integer>
constexpr Integer feature_count(FeatureMap map, Integer channels) {
  return map == FeatureMap::kTaylor ? 1 + channels + channels * (channels + 1) / 2 : channels;
}

/// GateLoop for heads of K keys and V values (section 3.2):
///   S_t = a_t S_{t-1} + k_t^T v_t, y_t = q_t Re(S_t)
/// q, k: (B, T, H, K), v, y: (B, T, H, V) real in `dtype` (not complex). a: (B, T, H), or if
/// `per_key` (B, T, H, K), in the accumulation type, complex if `complex`; its strides count its
/// elements. States: (B, H, K, V) of the type of a. saved_states: (B, gate_loop_chunks(T, per_key),
/// H, 1 or 2, K, V) real, contiguous. They are the parts of the state before each chunk in scan
/// order; null where no backward pass follows. Beside Offsets states are (N, H, K, V) and (1,
/// gate_loop_chunks(T, N, per_key), H, 1 or 2, K, V). With a feature map, which excludes per_key,
/// states have feature_count(K) keys instead of K.
struct GateLoop {
  DType dtype = DType::kFloat32;
  HeadsShape shape;
  bool complex = true;
  bool per_key = false;
  FeatureMap feature_map = FeatureMap::kNone;
  bool reverse = false;
  ConstHeads q, k, v, a;
  ConstState initial_state = nullptr;
  Heads y;
  State final_state = nullptr;
  void* saved_states = nullptr;
  Offsets offsets = {};
};

/// Adjoint of GateLoop from its `saved_states`. da is exact where a is zero.
/// Nullable: dy.data (then zero), dfinal_state, dinitial_state.
struct GateLoopBackward {
  DType dtype = DType::kFloat32;
  HeadsShape shape;
  bool complex = true;
  bool per_key = false;
  FeatureMap feature_map = FeatureMap::kNone;
  bool reverse = false;
  ConstHeads q, k, v, a, dy;
  const void* saved_states = nullptr;
  ConstState dfinal_state = nullptr;
  Heads dq, dk, dv, da;
  State dinitial_state = nullptr;
  Offsets offsets = {};
};

/// y = x / max(‖x‖, ε) √columns gain, row by row, with the Euclidean norm ‖x‖: zeros give zeros.
/// ε is 1e-12 as in the reference; in float16, where that is zero, the least positive number.
/// x, y: (rows, columns) contiguous, gain: (columns); in `dtype`, not complex.
struct RmsNorm {
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const void* x = nullptr;
  const void* gain = nullptr;
  void* y = nullptr;
};

/// Adjoint of RmsNorm; nothing flows through a norm below ε. The norm is computed again: beside
/// reading x it is free. x, dy, dx: (rows, columns) contiguous, gain, dgain: (columns).
struct RmsNormBackward {
  DType dtype = DType::kFloat32;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const void* x = nullptr;
  const void* gain = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
  void* dgain = nullptr;
};

/// Bytes of scratch that run() needs for these parameters with this many threads; 64-byte aligned.
std::size_t scratch_bytes(const LinearRecurrence&, int threads);
std::size_t scratch_bytes(const LinearRecurrenceBackward&, int threads);
std::size_t scratch_bytes(const PolarGateLoop&, int threads);
std::size_t scratch_bytes(const PolarGateLoopBackward&, int threads);
std::size_t scratch_bytes(const SimpleGateLoop&, int threads);
std::size_t scratch_bytes(const SimpleGateLoopBackward&, int threads);
std::size_t scratch_bytes(const GateLoop&, int threads);
std::size_t scratch_bytes(const GateLoopBackward&, int threads);
std::size_t scratch_bytes(const RmsNorm&, int threads);
std::size_t scratch_bytes(const RmsNormBackward&, int threads);

/// Runs the operation. Inputs and outputs may not overlap. Sizes may be zero (T = 0 copies the
/// initial state to the final one). Throws std::invalid_argument for a dtype the operation does
/// not take and for offsets that do not fit.
void run(const LinearRecurrence&, const Executor&, void* scratch);
void run(const LinearRecurrenceBackward&, const Executor&, void* scratch);
void run(const PolarGateLoop&, const Executor&, void* scratch);
void run(const PolarGateLoopBackward&, const Executor&, void* scratch);
void run(const SimpleGateLoop&, const Executor&, void* scratch);
void run(const SimpleGateLoopBackward&, const Executor&, void* scratch);
void run(const GateLoop&, const Executor&, void* scratch);
void run(const GateLoopBackward&, const Executor&, void* scratch);
void run(const RmsNorm&, const Executor&, void* scratch);
void run(const RmsNormBackward&, const Executor&, void* scratch);

}  // namespace gateloop::recurrence
