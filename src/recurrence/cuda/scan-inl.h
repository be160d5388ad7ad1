#pragma once

/// The scan driver: one pass over memory, time in chunks across blocks.
///
/// A block reads its chunk once and keeps it in registers. It finds the state before the chunk by
/// looking back, publishes the state after it, and writes its outputs. Looking back, a block takes
/// the nearest state that is already published. It applies to it what the chunks between do to any
/// state (their aggregates), in the order of the scan. Where one of them has published neither, the
/// block publishes its own aggregate and polls. The block that published the state did the same
/// arithmetic: the bits are those of a chain from chunk to chunk, wherever the look-back ends.
///
/// The body is a sequence of phases, between which all threads of a block synchronise. What a phase
/// does depends on the block and the thread alone. So a test can run it on a CPU in any order.
#include <cstdint>
#include <type_traits>

#include "recurrence/cuda/schedule-inl.h"

namespace gateloop::recurrence::cuda {

/// What a flag says of a slot; zero before the launch.
enum Carried : unsigned { kNothing = 0, kAggregate = 1, kState = 2 };

/// Predecessors whose flags a block reads at once, and none further back: one warp's lanes.
inline constexpr int kWindow = 32;

enum class Phase { kTake, kLoad, kMeasure, kPublish, kAnnounce, kPoll, kReceive, kFinish, kDone };

/// Op: what is scanned. It has a Value, Numbers (what is read of one step) and a Step (what a
/// thread keeps of it). It also has
///   kBackwards             the scan runs from the last step to the first
///   load(memory, place, i)  the Numbers of the thread's i-th step
///   step(numbers)          the Step
///   transition(step, c)    its Affine map for channel c
///   apply(memory, place, i, step, state)  advances the state over it and writes outputs
///   whole                  all its sequences are given and read in whole accesses
///
/// It may have kSaves: states at the start of every kSavedStateBlock steps are written. Or it may
/// have kRecomputes: they are read, and `apply` gets the forward state before the step, which
/// forward_transition(step, c) advances.
template <class Op, class Tile, class Memory>
class ScanBlock {
 public:
  using V = typename Op::Value;
  using T = typename V::Scalar;
  static constexpr int kSteps = Tile::kSteps, kLanes = Tile::kLanes, kChannels = Tile::kChannels;
  static constexpr int kPlanes = 3 * V::kParts;  // of a carry: aggregate a and x, state
  static constexpr int kSegments = kSavedStateBlock / kSteps;  // rows of threads to a saved state
  static_assert(kSavedStateBlock % kSteps == 0);
  static_assert(!Op::kRecomputes || Tile::kRows % kSegments == 0);
  static_assert(Op::kChannels == kChannels && Tile::kThreads >= kWindow);

  /// Of the states that are recomputed: those saved, and what each row of threads does to them.
  struct Recomputed {
    V saved[Tile::kRows / kSegments][Tile::kWidth];
    Affine<V> segments[Tile::kRows][Tile::kWidth];
  };
  struct Nothing {};
  struct Shared {
    Where where;
    unsigned flags[kWindow];
    Affine<V> segments[Tile::kRows][Tile::kWidth];  // what each row of threads does to a state
    V carry[Tile::kWidth];                          // state before the chunk
    std::conditional_t<Op::kRecomputes, Recomputed, Nothing> forward;
  };
  /// One thread's registers.
  struct Thread {
    int lane, row;
    Place place;
    std::int64_t begin;  // its first step
    int count;           // of its steps
    int distance;        // chunks back to the nearest state; kWindow: none
    bool published;      // the aggregate
    typename Op::Step steps[kSteps];
  };

  GATELOOP_HD ScanBlock(const Op& op, const Schedule& schedule, Shared& shared, Memory memory)
      : op_(op), s_(schedule), shared_(shared), memory_(memory) {}

  /// `block` counts for the ticket where nothing is carried.
  GATELOOP_HD void run(Phase phase, std::int64_t block, Thread& thread) {
    switch (phase) {
      case Phase::kTake:
        return take(block, thread);
      case Phase::kLoad:
        return load(thread);
      case Phase::kMeasure:
        return measure(thread);
      case Phase::kPublish:
        return publish(thread);
      case Phase::kAnnounce:
        return announce(thread, kAggregate);
      case Phase::kPoll:
        return poll(thread);
      case Phase::kReceive:
        return receive(thread);
      case Phase::kFinish:
        return finish(thread);
      case Phase::kDone:
        return;
    }
  }

  /// The same for all threads of the block.
  GATELOOP_HD Phase after(Phase phase, const Thread& thread) const {
    switch (phase) {
      case Phase::kTake:
        return shared_.where.empty ? Phase::kDone : Phase::kLoad;
      case Phase::kLoad:
        return shared_.where.ordinal == 0 ? Phase::kReceive : Phase::kMeasure;
      case Phase::kMeasure:
        if (thread.distance < kWindow) return Phase::kReceive;
        return thread.published ? Phase::kPoll : Phase::kPublish;
      case Phase::kPublish:
        return Phase::kAnnounce;
      case Phase::kAnnounce:
        return Phase::kPoll;
      case Phase::kPoll:
        return Phase::kMeasure;
      case Phase::kReceive:
        return Phase::kFinish;
      case Phase::kFinish:
      case Phase::kDone:
        break;
    }
    return Phase::kDone;
  }

 private:
  // ---------------------------------------------------------------- phases

  GATELOOP_HD void take(std::int64_t block, Thread& thread) {
    if (thread.lane != 0 || thread.row != 0) return;
    const std::int64_t ticket = s_.ticket == nullptr ? block : memory_.next(s_.ticket);
    shared_.where = locate<Tile, Op::kBackwards>(s_, ticket, memory_);
    shared_.where.whole &= op_.whole;
  }

  /// Most blocks are whole. Without a condition at every access the compiler has a third of the
  /// instructions, which bound the speed otherwise.
  GATELOOP_HD void load(Thread& thread) {
    locate_thread(thread);
    if (shared_.where.whole) {
      load_steps(thread, WholePlace{thread.place});
    } else {
      load_steps(thread, thread.place);
    }
    thread.published = false;
    if (shared_.where.ordinal > 0) poll(thread);
  }

  GATELOOP_HD void locate_thread(Thread& thread) const {
    const Where& w = shared_.where;
    const std::int64_t channel = w.tile * Tile::kWidth + thread.lane * kChannels;
    const std::int64_t left = s_.channels - channel;
    const int valid = static_cast<int>(left < 0 ? 0 : left < kChannels ? left : kChannels);
    thread.begin = w.chunk * Tile::kChunk + thread.row * kSteps;
    const std::int64_t time = w.first + w.direction * thread.begin;
    thread.place = Place{w.sequence, w.batch, channel, time, thread.begin == 0, valid};
    const std::int64_t steps = w.length - thread.begin;
    thread.count = static_cast<int>(steps < 0 ? 0 : steps < kSteps ? steps : kSteps);
  }

  template <class AnyPlace>
  GATELOOP_HD void load_steps(Thread& thread, const AnyPlace& place) {
    const int count = AnyPlace::kWhole ? kSteps : thread.count;
    typename Op::Numbers numbers[kSteps] = {};  // all on their way before the first is used
    GATELOOP_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i < count) numbers[i] = op_.load(memory_, place, i);
    }
    GATELOOP_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (i < count) thread.steps[i] = op_.step(numbers[i]);
    }
    if constexpr (Op::kRecomputes) load_saved(thread, count);
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      Affine<V> segment = Affine<V>::identity();
      GATELOOP_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const int at = Op::kBackwards ? kSteps - 1 - i : i;
        if (at < count) segment = compose(segment, op_.transition(thread.steps[at], c));
      }
      shared_.segments[thread.row][in_row(thread, c)] = segment;
    }
  }

  GATELOOP_HD void publish(Thread& thread) {
    thread.published = true;
    const Where& w = shared_.where;
    if (thread.row != 0 || w.last) return;
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const Affine<V> chunk = chunk_map(thread, c);
      put_carry(w.slot, 0, thread, c, chunk.a);
      put_carry(w.slot, V::kParts, thread, c, chunk.x);
    }
  }

  GATELOOP_HD void announce(const Thread& thread, Carried what) {
    const Where& w = shared_.where;
    if (thread.lane != 0 || thread.row != 0 || w.last) return;
    memory_.release(flag(w.slot), what);
  }

  GATELOOP_HD void poll(const Thread& thread) {
    const int at = thread.row * kLanes + thread.lane;
    if (at >= kWindow) return;
    const Where& w = shared_.where;
    shared_.flags[at] = at < w.ordinal ? memory_.acquire(flag(before(w.slot, at + 1))) : kNothing;
  }

  GATELOOP_HD void measure(Thread& thread) {
    int distance = 0;
    while (distance < kWindow && shared_.flags[distance] == kAggregate) ++distance;
    thread.distance = distance < kWindow && shared_.flags[distance] == kState ? distance : kWindow;
  }

  GATELOOP_HD void receive(const Thread& thread) {
    if (thread.row != 0) return;
    const Where& w = shared_.where;
    if (w.ordinal == 0) {
      const auto initial = op_.initial.load(memory_, state_row(thread.place), 0);
      GATELOOP_UNROLL
      for (int c = 0; c < kChannels; ++c) hand_on(thread, c, From<V>::lane(initial, c));
      return;
    }
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      V state = get_carry(before(w.slot, thread.distance + 1), 2 * V::kParts, thread, c);
      for (int back = thread.distance; back > 0; --back) {
        const std::int64_t slot = before(w.slot, back);
        const Affine<V> chunk{get_carry(slot, 0, thread, c), get_carry(slot, V::kParts, thread, c)};
        state = apply(chunk, state);
      }
      hand_on(thread, c, state);
    }
  }

  GATELOOP_HD void finish(Thread& thread) {
    if (s_.flags != nullptr) announce(thread, kState);
    if (shared_.where.whole) {
      finish_steps(thread, WholePlace{thread.place});
    } else {
      finish_steps(thread, thread.place);
    }
  }

  template <class AnyPlace>
  GATELOOP_HD void finish_steps(Thread& thread, const AnyPlace& place) {
    const int count = AnyPlace::kWhole ? kSteps : thread.count;
    V state[kChannels];
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) state[c] = state_before(thread, c);
    if constexpr (Op::kSaves) save(thread, state);
    if constexpr (Op::kRecomputes) {
      V before[kSteps][kChannels] = {};
      recompute(thread, count, before);
      GATELOOP_UNROLL
      for (int i = kSteps - 1; i >= 0; --i) {
        if (i < count) op_.apply(memory_, place, i, thread.steps[i], before[i], state);
      }
    } else {
      GATELOOP_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const int at = Op::kBackwards ? kSteps - 1 - i : i;
        if (at < count) op_.apply(memory_, place, at, thread.steps[at], state);
      }
    }
    const Where& w = shared_.where;
    if (w.last && thread.row == last_row() && !op_.final_state.is_null()) {
      op_.final_state.store(memory_, state_row(thread.place), 0, lane_of(state));
    }
  }

  // ---------------------------------------------------------------- inside the chunk

  /// Rows of threads with a step; a chunk without one has a row, which hands the state on.
  GATELOOP_HD int active_rows() const {
    const Where& w = shared_.where;
    if (w.whole) return Tile::kRows;
    const std::int64_t steps = w.length - w.chunk * Tile::kChunk;
    if (steps >= Tile::kChunk) return Tile::kRows;
    return steps <= 0 ? 1 : static_cast<int>(div_up(steps, kSteps));
  }
  /// In the order of the scan.
  GATELOOP_HD int last_row() const { return Op::kBackwards ? 0 : active_rows() - 1; }
  static GATELOOP_HD int in_row(const Thread& thread, int c) { return c * kLanes + thread.lane; }

  GATELOOP_HD Affine<V> chunk_map(const Thread& thread, int c) const {
    const int rows = active_rows();
    Affine<V> map = shared_.segments[Op::kBackwards ? rows - 1 : 0][in_row(thread, c)];
    for (int i = 1; i < rows; ++i) {
      map = compose(map, shared_.segments[Op::kBackwards ? rows - 1 - i : i][in_row(thread, c)]);
    }
    return map;
  }

  /// `state` is that before the chunk.
  GATELOOP_HD void hand_on(const Thread& thread, int c, V state) {
    const Where& w = shared_.where;
    shared_.carry[in_row(thread, c)] = state;
    if (!w.last) {
      put_carry(w.slot, 2 * V::kParts, thread, c, apply(chunk_map(thread, c), state));
    }
  }

  /// Before the first of this thread's steps in the order of the scan.
  GATELOOP_HD V state_before(const Thread& thread, int c) const {
    V state = shared_.carry[in_row(thread, c)];
    const int rows = active_rows();
    const int passed = Op::kBackwards ? rows - 1 - thread.row : thread.row;
    for (int i = 0; i < passed; ++i) {
      state = apply(shared_.segments[Op::kBackwards ? rows - 1 - i : i][in_row(thread, c)], state);
    }
    return state;
  }

  // ---------------------------------------------------------------- saved states

  GATELOOP_HD Place saved_row(const Thread& thread) const {
    return row_of(shared_.where.saved + thread.begin / kSavedStateBlock, thread.place);
  }

  GATELOOP_HD void save(const Thread& thread, const V (&state)[kChannels]) {
    if (op_.saved.is_null() || thread.count == 0) return;
    if (thread.begin % kSavedStateBlock != 0) return;
    op_.saved.store(memory_, saved_row(thread), 0, lane_of(state));
  }

  GATELOOP_HD void load_saved(const Thread& thread, int count) {
    if (thread.row % kSegments == 0 && count > 0) {
      const auto saved = op_.saved.load(memory_, saved_row(thread), 0);
      GATELOOP_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        shared_.forward.saved[thread.row / kSegments][in_row(thread, c)] = From<V>::lane(saved, c);
      }
    }
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      Affine<V> segment = Affine<V>::identity();
      GATELOOP_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        if (i < count) segment = compose(segment, op_.forward_transition(thread.steps[i], c));
      }
      shared_.forward.segments[thread.row][in_row(thread, c)] = segment;
    }
  }

  /// The forward state before each of the thread's steps.
  GATELOOP_HD void recompute(const Thread& thread, int count,
                             V (&before)[kSteps][kChannels]) const {
    const int first = thread.row - thread.row % kSegments;
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      V state = shared_.forward.saved[thread.row / kSegments][in_row(thread, c)];
      for (int row = first; row < thread.row; ++row) {
        state = apply(shared_.forward.segments[row][in_row(thread, c)], state);
      }
      GATELOOP_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        if (i >= count) break;
        before[i][c] = state;
        if (i + 1 < kSteps) state = apply(op_.forward_transition(thread.steps[i], c), state);
      }
    }
  }

  // ---------------------------------------------------------------- memory

  /// The slot `distance` chunks before `slot` in the order of the scan.
  static GATELOOP_HD std::int64_t before(std::int64_t slot, int distance) {
    return Op::kBackwards ? slot + distance : slot - distance;
  }
  GATELOOP_HD unsigned* flag(std::int64_t slot) const {
    return s_.flags + slot * s_.tiles + shared_.where.tile;
  }
  GATELOOP_HD T* carry_at(std::int64_t slot, int plane, const Thread& thread, int c) const {
    const std::int64_t row = (slot * kPlanes + plane) * s_.tiles + shared_.where.tile;
    return static_cast<T*>(s_.carries) + row * Tile::kWidth + in_row(thread, c);
  }
  GATELOOP_HD V get_carry(std::int64_t slot, int plane, const Thread& thread, int c) {
    Lane<T, V::kParts> parts{};
    GATELOOP_UNROLL
    for (int i = 0; i < V::kParts; ++i) {
      if (c >= thread.place.valid) break;
      parts.set(i, memory_.load_fresh(carry_at(slot, plane + i, thread, c)));
    }
    return From<V>::lane(parts, 0);
  }
  GATELOOP_HD void put_carry(std::int64_t slot, int plane, const Thread& thread, int c, V value) {
    if (c >= thread.place.valid) return;
    Lane<T, V::kParts> parts;
    put(value, parts, 0);
    GATELOOP_UNROLL
    for (int i = 0; i < V::kParts; ++i) {
      memory_.store(carry_at(slot, plane + i, thread, c), parts.get(i));
    }
  }
  static GATELOOP_HD auto lane_of(const V (&state)[kChannels]) {
    Lane<T, kChannels * V::kParts> lane{};
    GATELOOP_UNROLL
    for (int c = 0; c < kChannels; ++c) put(state[c], lane, c);
    return lane;
  }

  const Op& op_;
  const Schedule& s_;
  Shared& shared_;
  Memory memory_;
};

}  // namespace gateloop::recurrence::cuda
