#pragma once

/// The norm of rows and its adjoint.
///
/// The threads of a row load it once and keep it in registers. They add their sums in shared
/// memory, all in the same order, and write the row. Blocks take rows in turns. So the gain is
/// loaded once a block, and its gradient is summed in registers. A row that registers do not hold
/// (see norm_launch) is read a second time. Its sums of the gradient lie in scratch.
///
/// Bodies are phases as in the scan driver: the threads of a warp synchronise after kLoad, those
/// of a block after every other phase.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cuda/numbers-inl.h"
#include "recurrence/cuda/schedule-inl.h"

namespace gateloop::recurrence::cuda {

/// The reference's ε, and in float16, where that is zero, the least positive number.
template <class S>
GATELOOP_HD constexpr Accumulation<S> norm_floor() {
  return std::is_same_v<S, Float16> ? Accumulation<S>(0x1p-24) : Accumulation<S>(1e-12);
}

/// Makes the compiler widen 16-bit numbers again where they are used again. Kept widened across
/// phases they would take twice the registers, and up to 124 bytes spilled.
template <class S, int kCount, int kSteps>
GATELOOP_HD void stay_packed([[maybe_unused]] Lane<S, kCount> (&lanes)[kSteps]) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 2) {
    GATELOOP_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      GATELOOP_UNROLL
      for (int j = 0; j < kCount / 2; ++j) asm volatile("" : "+r"(lanes[s].words[j]));
    }
  }
#endif
}

/// Of one launch. kKeeps: registers hold a row. kWide: a vector is one access, because its numbers
/// are adjacent and aligned.
template <class S, bool kBackward_, bool kKeeps_, bool kWide_>
struct NormRows {
  using Storage = S;
  static constexpr bool kBackward = kBackward_, kKeeps = kKeeps_, kWide = kWide_;

  const S *x = nullptr, *gain = nullptr, *dy = nullptr;
  S* out = nullptr;                 // y or dx
  Accumulation<S>* sums = nullptr;  // (blocks, positions): of dgain, see `Thread::sums`
  Accumulation<S> root = 0;         // √columns
  std::int64_t rows = 0, columns = 0;
  std::int64_t blocks = 0, positions = 0;
  int turns = 0;
  /// True: the numbers of a vector are adjacent. False: those of neighbouring threads are. A rule
  /// on the shape alone, because it changes the order of the sums.
  bool vectors = false;
};

enum class NormPhase { kBegin, kLoad, kFold, kFinish, kMerge, kDone };

template <class Op, class Tile, class Memory>
class NormBlock {
 public:
  using S = typename Op::Storage;
  using T = Accumulation<S>;
  static constexpr int kLanes = Tile::kLanes, kRows = Tile::kRows;
  static constexpr int kSteps = Tile::kSteps, kChannels = Tile::kChannels;
  static constexpr int kWidth = Tile::kWidth, kColumns = kWidth * kSteps;
  static constexpr int kWarp = 32, kWarps = kLanes / kWarp;
  static constexpr int kSums = Op::kBackward ? 2 : 1;  // Σ x², Σ x gain dy
  /// The rows of a block add their sums of the gradient.
  static constexpr bool kMerges = Op::kBackward && Op::kKeeps;
  static_assert(kLanes % kWarp == 0 && (kRows == 1 || (kWarps == 1 && Op::kKeeps)));
  using Vector = Lane<S, kChannels>;

  /// Two buffers, used in alternate turns: a thread may write those of the next turn while others
  /// still read. It gets no further ahead, because the next meeting stops it.
  struct Shared {
    Lane<T, 4> partials[2][kSums][kRows][kLanes / 4];  // of threads
    T folded[2][kSums][kRows][kWarps];                 // of warps
    T merged[kMerges && kRows > 1 ? kColumns : 1];
  };
  /// One thread's registers.
  struct Thread {
    int lane, row;
    int turn;
    int merged;  // rows of the block that have added their sums
    Vector x[kSteps], dy[kSteps], gain[kSteps];
    T sums[kSteps][kChannels];  // of dgain
  };

  GATELOOP_HD NormBlock(const Op& op, Shared& shared, Memory memory)
      : op_(op), shared_(shared), memory_(memory) {}

  GATELOOP_HD void run(NormPhase phase, std::int64_t block, Thread& thread) {
    switch (phase) {
      case NormPhase::kBegin:
        return begin(block, thread);
      case NormPhase::kLoad:
        return load(block, thread);
      case NormPhase::kFold:
        return fold(thread);
      case NormPhase::kFinish:
        return finish(block, thread);
      case NormPhase::kMerge:
        return merge(block, thread);
      case NormPhase::kDone:
        return;
    }
  }

  /// The same for all threads of the block.
  GATELOOP_HD NormPhase after(NormPhase phase, const Thread& thread) const {
    switch (phase) {
      case NormPhase::kBegin:
        return NormPhase::kLoad;
      case NormPhase::kLoad:
        return kWarps > 1 ? NormPhase::kFold : NormPhase::kFinish;
      case NormPhase::kFold:
        return NormPhase::kFinish;
      case NormPhase::kFinish:
        if (thread.turn < op_.turns) return NormPhase::kLoad;
        return kMerges ? NormPhase::kMerge : NormPhase::kDone;
      case NormPhase::kMerge:
        return thread.merged < kRows ? NormPhase::kMerge : NormPhase::kDone;
      case NormPhase::kDone:
        break;
    }
    return NormPhase::kDone;
  }

 private:
  // ---------------------------------------------------------------- phases

  GATELOOP_HD void begin(std::int64_t block, Thread& thread) {
    thread.turn = 0;
    thread.merged = 0;
    if constexpr (Op::kKeeps) {
      if (row_of(block, thread) < op_.rows) load_row(op_.gain, 0, thread, thread.gain);
      if constexpr (Op::kBackward) {
        GATELOOP_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          GATELOOP_UNROLL
          for (int i = 0; i < kChannels; ++i) thread.sums[s][i] = T(0);
        }
      }
    }
  }

  GATELOOP_HD void load(std::int64_t block, Thread& thread) {
    const std::int64_t row = row_of(block, thread);
    if (row >= op_.rows) return;
    T squares[kChains] = {}, along[kChains] = {};
    for (std::int64_t base = 0; base < op_.columns; base += kColumns) {
      load_row(op_.x + row * op_.columns, base, thread, thread.x);
      if constexpr (Op::kBackward) {
        load_row(op_.dy + row * op_.columns, base, thread, thread.dy);
        if constexpr (!Op::kKeeps) load_row(op_.gain, base, thread, thread.gain);
      }
      GATELOOP_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        if (s * kWidth >= left_of(base)) break;
        GATELOOP_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          const T value = widen(thread.x[s].get(i));
          squares[i % kChains] = std::fma(value, value, squares[i % kChains]);
          if constexpr (Op::kBackward) {
            along[i % kChains] = std::fma(value, gained(thread, s, i), along[i % kChains]);
          }
        }
      }
      if constexpr (Op::kKeeps) break;
    }
    auto& partials = shared_.partials[thread.turn % 2];
    partials[0][thread.row][thread.lane / 4].set(thread.lane % 4, sum_of(squares));
    if constexpr (Op::kBackward) {
      partials[1][thread.row][thread.lane / 4].set(thread.lane % 4, sum_of(along));
    }
  }

  GATELOOP_HD void fold(const Thread& thread) {
    if (thread.lane % kWarp != 0) return;
    GATELOOP_UNROLL
    for (int k = 0; k < kSums; ++k) {
      shared_.folded[thread.turn % 2][k][thread.row][thread.lane / kWarp] = of_warp(thread, k);
    }
  }

  /// With n = √columns / max(‖x‖, ε): y = n x gain; and dgain += n x dy, dx = n (gain dy - x (x ·
  /// gain dy) / ‖x‖²). Where the norm is below ε, dx is without its second term.
  GATELOOP_HD void finish(std::int64_t block, Thread& thread) {
    const std::int64_t row = row_of(block, thread);
    if (row < op_.rows) {
      const T norm = std::sqrt(of_row(thread, 0)), floor = norm_floor<S>();
      // In this order a norm that is no number stays so.
      const T scale = op_.root / (norm < floor ? floor : norm);
      T shrink = T(0);
      if constexpr (Op::kBackward) {
        shrink = norm < floor ? T(0) : of_row(thread, 1) / norm / norm;
      }
      if constexpr (Op::kKeeps) {
        stay_packed(thread.x);
        stay_packed(thread.gain);
        if constexpr (Op::kBackward) stay_packed(thread.dy);
      }
      for (std::int64_t base = 0; base < op_.columns; base += kColumns) {
        if constexpr (!Op::kKeeps) {
          load_row(op_.x + row * op_.columns, base, thread, thread.x);
          load_row(op_.gain, base, thread, thread.gain);
          if constexpr (Op::kBackward) {
            load_row(op_.dy + row * op_.columns, base, thread, thread.dy);
            load_sums(block, base, thread);
          }
        }
        write_row(row, base, thread, scale, shrink);
        if constexpr (Op::kBackward && !Op::kKeeps) store_sums(block, base, thread);
        if constexpr (Op::kKeeps) break;
      }
    }
    ++thread.turn;
  }

  /// Row by row of the block, the last one writes.
  GATELOOP_HD void merge(std::int64_t block, Thread& thread) {
    if (thread.row == thread.merged) {
      if constexpr (kRows > 1) {
        GATELOOP_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          GATELOOP_UNROLL
          for (int i = 0; i < kChannels; ++i) {
            T& merged = shared_.merged[position_of(thread, s, i)];
            if (thread.row > 0) thread.sums[s][i] = merged + thread.sums[s][i];
            merged = thread.sums[s][i];
          }
        }
      }
      if (thread.row == kRows - 1) store_sums(block, 0, thread);
    }
    ++thread.merged;
  }

  // ---------------------------------------------------------------- sums

  /// Independent chains of additions.
  static constexpr int kChains = kChannels < 4 ? kChannels : 4;
  static GATELOOP_HD T sum_of(const T (&chains)[kChains]) {
    T sum = chains[0];
    GATELOOP_UNROLL
    for (int i = 1; i < kChains; ++i) sum += chains[i];
    return sum;
  }

  /// Every thread adds the sums of its warp: 8 loads of shared memory that all lanes share.
  GATELOOP_HD T of_warp(const Thread& thread, int k) const {
    const Lane<T, 4>* const partials =
        shared_.partials[thread.turn % 2][k][thread.row] + thread.lane / kWarp * (kWarp / 4);
    Lane<T, 4> sums = partials[0];
    GATELOOP_UNROLL
    for (int j = 1; j < kWarp / 4; ++j) {
      const Lane<T, 4> next = partials[j];
      GATELOOP_UNROLL
      for (int i = 0; i < 4; ++i) sums.set(i, sums.get(i) + next.get(i));
    }
    return (sums.get(0) + sums.get(1)) + (sums.get(2) + sums.get(3));
  }
  GATELOOP_HD T of_row(const Thread& thread, int k) const {
    if constexpr (kWarps == 1) return of_warp(thread, k);
    const T(&folded)[kWarps] = shared_.folded[thread.turn % 2][k][thread.row];
    T sum = folded[0];
    GATELOOP_UNROLL
    for (int i = 1; i < kWarps; ++i) sum += folded[i];
    return sum;
  }

  static GATELOOP_HD T gained(const Thread& thread, int s, int i) {
    return widen(thread.gain[s].get(i)) * widen(thread.dy[s].get(i));
  }

  GATELOOP_HD void write_row(std::int64_t row, std::int64_t base, Thread& thread, T scale,
                             T shrink) {
    GATELOOP_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      if (s * kWidth >= left_of(base)) break;
      Vector out{};
      GATELOOP_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        const T value = widen(thread.x[s].get(i));
        if constexpr (Op::kBackward) {
          out.set(i, narrow<S>(scale * std::fma(-value, shrink, gained(thread, s, i))));
          thread.sums[s][i] =
              std::fma(scale * value, widen(thread.dy[s].get(i)), thread.sums[s][i]);
        } else {
          out.set(i, narrow<S>(value * scale * widen(thread.gain[s].get(i))));
        }
      }
      store_vector(op_.out + row * op_.columns, base, thread, s, out);
    }
  }

  // ---------------------------------------------------------------- memory

  GATELOOP_HD std::int64_t row_of(std::int64_t block, const Thread& thread) const {
    return (thread.turn * op_.blocks + block) * kRows + thread.row;
  }
  /// Columns from `base` on, of those that registers hold.
  GATELOOP_HD int left_of(std::int64_t base) const {
    const std::int64_t left = op_.columns - base;
    return static_cast<int>(left < kColumns ? left : kColumns);
  }
  /// Columns of a thread: the i-th of step s is first_of(thread, s) + i stride().
  GATELOOP_HD int first_of(const Thread& thread, int s) const {
    return s * kWidth + thread.lane * (vectors() ? kChannels : 1);
  }
  GATELOOP_HD int stride() const { return vectors() ? 1 : kLanes; }
  GATELOOP_HD bool vectors() const { return Op::kWide || op_.vectors; }

  /// Columns that do not exist read as zeros.
  GATELOOP_HD void load_row(const S* row, std::int64_t base, const Thread& thread,
                            Vector (&to)[kSteps]) {
    const int left = left_of(base);
    if constexpr (Op::kWide) {
      GATELOOP_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        const int first = first_of(thread, s);
        to[s] = first < left ? memory_.load(reinterpret_cast<const Vector*>(row + base + first))
                             : Vector{};
      }
    } else {
      GATELOOP_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        to[s] = Vector{};
        GATELOOP_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          const int column = first_of(thread, s) + i * stride();
          if (column < left) to[s].set(i, memory_.load(row + base + column));
        }
      }
    }
  }
  GATELOOP_HD void store_vector(S* row, std::int64_t base, const Thread& thread, int s,
                                const Vector& vector) {
    const int left = left_of(base), first = first_of(thread, s);
    if constexpr (Op::kWide) {
      if (first < left) memory_.store(reinterpret_cast<Vector*>(row + base + first), vector);
    } else {
      GATELOOP_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        const int column = first + i * stride();
        if (column < left) memory_.store(row + base + column, vector.get(i));
      }
    }
  }

  /// Sums lie so that the threads of a warp write adjacent ones: see NormSums.
  static GATELOOP_HD int position_of(const Thread& thread, int s, int i) {
    return (s * kChannels + i) * kLanes + thread.lane;
  }
  GATELOOP_HD T* sums_of(std::int64_t block, std::int64_t base) const {
    return op_.sums + block * op_.positions + base;
  }
  /// Zeros in the first turn.
  GATELOOP_HD void load_sums(std::int64_t block, std::int64_t base, Thread& thread) {
    GATELOOP_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      GATELOOP_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        const bool any = thread.turn > 0 && s * kWidth < left_of(base);
        thread.sums[s][i] =
            any ? memory_.load(sums_of(block, base) + position_of(thread, s, i)) : T(0);
      }
    }
  }
  GATELOOP_HD void store_sums(std::int64_t block, std::int64_t base, const Thread& thread) {
    GATELOOP_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      if (s * kWidth >= left_of(base)) break;
      GATELOOP_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        memory_.store(sums_of(block, base) + position_of(thread, s, i), thread.sums[s][i]);
      }
    }
  }

  const Op& op_;
  Shared& shared_;
  Memory memory_;
};

// ---------------------------------------------------------------- dgain

/// Adds the rows of `sums` to dgain.
template <class S>
struct NormSums {
  using Storage = S;
  const Accumulation<S>* sums = nullptr;  // (rows, positions)
  S* dgain = nullptr;
  std::int64_t rows = 0, positions = 0, columns = 0;
  int lanes = 1, channels = 1;  // of the block that wrote them; channels 1 where not in vectors
};

/// Thread (lane, row) adds every kRows-th row of its position, and one row of threads their sums.
template <class Op, class Tile, class Memory>
class NormSumsBlock {
 public:
  using S = typename Op::Storage;
  using T = Accumulation<S>;
  struct Shared {
    T sums[Tile::kRows][Tile::kLanes];
  };
  struct Thread {
    int lane, row;
  };

  GATELOOP_HD NormSumsBlock(const Op& op, Shared& shared, Memory memory)
      : op_(op), shared_(shared), memory_(memory) {}

  GATELOOP_HD void run(NormPhase phase, std::int64_t block, Thread& thread) {
    const std::int64_t position = block * Tile::kLanes + thread.lane;
    if (position >= op_.positions) return;
    if (phase == NormPhase::kLoad) return load(position, thread);
    if (thread.row == 0) finish(position, thread);
  }
  GATELOOP_HD NormPhase after(NormPhase phase, const Thread&) const {
    if (phase == NormPhase::kBegin) return NormPhase::kLoad;
    return phase == NormPhase::kLoad ? NormPhase::kFinish : NormPhase::kDone;
  }

 private:
  GATELOOP_HD void load(std::int64_t position, const Thread& thread) {
    T sum = T(0);
    for (std::int64_t row = thread.row; row < op_.rows; row += Tile::kRows) {
      sum += memory_.load(op_.sums + row * op_.positions + position);
    }
    shared_.sums[thread.row][thread.lane] = sum;
  }
  GATELOOP_HD void finish(std::int64_t position, const Thread& thread) {
    T sum = shared_.sums[0][thread.lane];
    GATELOOP_UNROLL
    for (int row = 1; row < Tile::kRows; ++row) sum += shared_.sums[row][thread.lane];
    const std::int64_t column = column_of(position);
    if (column < op_.columns) memory_.store(op_.dgain + column, narrow<S>(sum));
  }
  /// The inverse of NormBlock's position_of.
  GATELOOP_HD std::int64_t column_of(std::int64_t position) const {
    const int width = op_.lanes * op_.channels;
    const auto inside = static_cast<int>(position % width);
    return position - inside + inside % op_.lanes * op_.channels + inside / op_.lanes;
  }

  const Op& op_;
  Shared& shared_;
  Memory memory_;
};

// ---------------------------------------------------------------- plans, on the host

template <class Params>
inline constexpr bool is_norm_backward = std::is_same_v<Params, RmsNormBackward>;

template <class Op, class Tile, class Params>
Op norm_rows(const Params& p) {
  using S = typename Op::Storage;
  Op op;
  op.x = static_cast<const S*>(p.x);
  op.gain = static_cast<const S*>(p.gain);
  if constexpr (Op::kBackward) {
    op.dy = static_cast<const S*>(p.dy);
    op.out = static_cast<S*>(p.dx);
  } else {
    op.out = static_cast<S*>(p.y);
  }
  op.rows = p.rows;
  op.columns = p.columns;
  op.root = std::sqrt(static_cast<Accumulation<S>>(p.columns));
  const std::int64_t groups = p.columns == 0 ? 0 : div_up(p.rows, Tile::kRows);
  op.blocks = std::min<std::int64_t>(norm_blocks(Tile::kBlocks), groups);
  op.turns = op.blocks == 0 ? 0 : static_cast<int>(div_up(groups, op.blocks));
  op.positions = div_up(p.columns, Tile::kWidth) * Tile::kWidth;
  op.vectors = p.columns % Tile::kChannels == 0;
  return op;
}

inline bool is_wide(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }
inline bool is_wide(const RmsNorm& p) { return is_wide(p.x) && is_wide(p.gain) && is_wide(p.y); }
inline bool is_wide(const RmsNormBackward& p) {
  return is_wide(p.x) && is_wide(p.gain) && is_wide(p.dy) && is_wide(p.dx);
}

/// Calls f.operator()<Tile>(op) with the first tile whose registers hold a row, or the last one.
template <class S, int kSize, class Params, class F>
void visit_norm_of(const Params& p, const F& f) {
  constexpr bool kBackward = is_norm_backward<Params>;
  constexpr Launch kLaunch =
      kBackward ? norm_backward_launch(kSize, sizeof(S)) : norm_launch(kSize, sizeof(S));
  constexpr bool kKeeps = kSize < kNormSizes;
  using Rows = Tile<kLaunch>;
  if constexpr (kKeeps) {
    if (p.columns > Rows::kWidth * Rows::kSteps) return visit_norm_of<S, kSize + 1>(p, f);
  }
  if (p.columns % Rows::kChannels == 0 && is_wide(p)) {
    f.template operator()<Rows>(norm_rows<NormRows<S, kBackward, kKeeps, true>, Rows>(p));
  } else {
    f.template operator()<Rows>(norm_rows<NormRows<S, kBackward, kKeeps, false>, Rows>(p));
  }
}
template <class Params, class F>
void visit_norm(const char* name, const Params& p, const F& f) {
  cpu::check(name, {1, p.rows, p.columns}, p.dtype, /*complex_allowed=*/false);
  switch (p.dtype) {
    case DType::kFloat32:
      return visit_norm_of<float, 0>(p, f);
    case DType::kFloat64:
      return visit_norm_of<double, 0>(p, f);
    case DType::kBFloat16:
      return visit_norm_of<BFloat16, 0>(p, f);
    case DType::kFloat16:
      return visit_norm_of<Float16, 0>(p, f);
    case DType::kComplex64:
    case DType::kComplex128:
      break;
  }
  cpu::throw_dtype(p.dtype);
}
template <class F>
void visit(const RmsNorm& p, const F& f) {
  visit_norm("RmsNorm", p, f);
}
template <class F>
void visit(const RmsNormBackward& p, const F& f) {
  visit_norm("RmsNormBackward", p, f);
}

/// Of partial sums of dgain: none forward.
template <class Op>
std::size_t norm_scratch(const Op& op) {
  if constexpr (!Op::kBackward) return 0;
  return static_cast<std::size_t>(op.blocks * op.positions) *
         sizeof(Accumulation<typename Op::Storage>);
}

/// What adds the partial sums that `op` writes.
template <class Tile, class Op>
auto norm_sums(const Op& op, void* dgain) {
  using S = typename Op::Storage;
  NormSums<S> sums;
  sums.sums = op.sums;
  sums.dgain = static_cast<S*>(dgain);
  sums.rows = op.blocks;
  sums.positions = op.positions;
  sums.columns = op.columns;
  sums.lanes = Tile::kLanes;
  sums.channels = op.vectors ? Tile::kChannels : 1;
  return sums;
}
using NormSumsTile = Tile<norm_sums_launch()>;

}  // namespace gateloop::recurrence::cuda
