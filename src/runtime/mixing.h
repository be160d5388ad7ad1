#pragma once

/// What mixers and simple gate loops make of their products, step by step, carrying their state.
#include <cstdint>

#include "runtime/network.h"
#include "runtime/rows.h"
#include "runtime/state.h"

namespace gateloop::runtime {

/// Products and results of a stage.
struct MixRows {
  Runs runs;
  float* products = nullptr;  ///< changed in place
  std::int64_t products_stride = 0;
  float* y = nullptr;
  std::int64_t y_stride = 0;
};

/// A stage with output kSimple, kGateLoop or kAttention, at the positions of a state.
class Mixing {
 public:
  /// `ones`: as many as the stage has channels.
  Mixing(const Network& network, const Stage& stage, StateData& state, const MixRows& rows,
         const float* ones);

  /// Whether scan() computes it, channel by channel; else heads do, by head().
  bool scans() const { return kind_ != Kind::kNone; }

  /// What is elementwise: before scan() or head(), groups [first, last) of a row of products.
  void prepare_row(std::int64_t row, std::int64_t first, std::int64_t last) const;

  /// Channels [first, last) of all sequences; less than all of them for one sequence alone. `next`:
  /// room for the state (B, channels, parts).
  void scan(std::int64_t first, std::int64_t last, const recurrence::Executor& executor,
            float* next, void* scratch) const;
  std::size_t scan_scratch_bytes(int threads) const;
  /// Numbers of `next`.
  std::int64_t state_numbers() const;

  /// All steps of one head of one sequence. `scratch`: head_scratch() numbers.
  void head(std::int64_t sequence, std::int64_t head, float* scratch) const;
  std::int64_t head_scratch() const;

 private:
  /// What scan() computes; kNone: nothing, heads do.
  enum class Kind : std::uint8_t { kNone, kPolar, kSigmoid, kSum };

  template <class F>
  void with_scan(std::int64_t first, std::int64_t last, float* next, const F& f) const;
  float* products(std::int64_t row) const { return rows_.products + row * rows_.products_stride; }
  /// Tokens that a sequence has read before these rows.
  std::int64_t position(std::int64_t sequence) const {
    return state_.positions[static_cast<std::size_t>(sequence)];
  }
  void wide_head(std::int64_t sequence, std::int64_t head, float* scratch) const;
  void make_transitions(float* z, std::int64_t count, float* k, float* scratch) const;
  float input_scale(const float* z) const;
  void attend_head(const model::AttentionSpec& spec, std::int64_t sequence, std::int64_t head,
                   float* scratch) const;
  void place(const model::AttentionSpec& spec, float* row, std::int64_t head, float* scratch) const;
  void rotate(float* row, std::int64_t first, std::int64_t last, std::int64_t position) const;
  /// Whether several steps of attention with a window are computed together.
  bool in_windows(std::int64_t sequence) const {
    return attention_->window && rows_.runs.steps(sequence) > 1;
  }
  struct Stored;
  struct Windowed;
  Windowed windowed(std::int64_t sequence, std::int64_t first) const;
  std::int64_t attention_scratch(std::int64_t sequence) const;
  void attend(std::int64_t sequence, std::int64_t head, std::int64_t first,
              recurrence::AttentionHead p, float* scratch) const;
  template <class Store>
  void attend_windows(std::int64_t sequence, std::int64_t head, const Stored& stored,
                      const Store& store, float* room) const;

  const model::ModelSpec& spec_;
  const Stage& stage_;
  const model::GateLoopSpec* gate_loop_ = nullptr;
  const model::AttentionSpec* attention_ = nullptr;
  StateData& state_;
  LayerState& layer_;
  const MixRows rows_;
  const float* ones_;
  Kind kind_ = Kind::kNone;
  std::int64_t width_ = 0;              // channels of v
  std::int64_t k_ = 0, v_ = 0, z_ = 0;  // columns
  std::int64_t parts_ = 1;              // of a state's number
  bool joint_ = false;                  // one projection to k v
  bool scales_ = false;                 // the input, by normalize_input, before the recurrence
};

}  // namespace gateloop::runtime
