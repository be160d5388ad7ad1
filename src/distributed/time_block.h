#pragma once

/// Where the block of a process lies in a sequence, and pieces of it.
#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace gateloop::distributed {

using OptionalTensor = std::optional<at::Tensor>;

/// Steps [begin, end) of a block, in memory's order.
struct Piece {
  std::int64_t begin = 0, end = 0;
  std::int64_t steps() const { return end - begin; }
  bool operator==(const Piece&) const = default;
  /// sequence (B, T, ...) of these steps.
  at::Tensor of(const at::Tensor& sequence) const { return sequence.narrow(1, begin, steps()); }
  std::vector<at::Tensor> of(at::TensorList sequences) const;
};

/// The block of this process. Blocks are numbered in the order of the scan: with reverse the block
/// of the last rank is 0.
class TimeBlock {
 public:
  /// `sequence` (B, T, ...). With cu_seqlens, which it checks, this gathers the lengths of blocks.
  TimeBlock(const char* op, c10::intrusive_ptr<c10d::ProcessGroup> group,
            const at::Tensor& sequence, bool reverse, const OptionalTensor& cu_seqlens,
            bool initial_state_needs_gradient);

  c10d::ProcessGroup& group() const { return *group_; }
  bool reverse() const { return reverse_; }
  bool packed() const { return packed_; }
  std::int64_t blocks() const { return group_->getSize(); }
  std::int64_t number() const { return number_of(group_->getRank()); }
  bool first() const { return number() == 0; }
  /// The rank that holds a block, and back.
  std::int64_t number_of(std::int64_t rank) const { return reverse_ ? blocks() - 1 - rank : rank; }

  Piece whole() const { return {0, steps_}; }
  /// `steps` at the end or the beginning of the scan.
  Piece last(std::int64_t steps) const { return at_edge(steps, !reverse_); }
  Piece first(std::int64_t steps) const { return at_edge(steps, reverse_); }
  /// Where sequences end within a piece, (N + 1) int64 from its beginning; absent if not packed.
  OptionalTensor cu_seqlens(const Piece& piece) const;

  /// Rows of a state that other blocks need from the last, and from the first, steps of this one.
  /// Only those that have steps outside of `piece` too.
  std::vector<std::int64_t> leaving_beyond(const Piece& piece) const;
  std::vector<std::int64_t> entering_beyond(const Piece& piece) const;
  /// The rank whose block ends each packed sequence; of an empty one that which has initial_state.
  std::vector<std::int64_t> ending_ranks() const;

 private:
  Piece at_edge(std::int64_t steps, bool right) const;
  std::vector<std::int64_t> beyond(const Piece& piece, bool crossing_right, bool all) const;

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::int64_t rows_, steps_;
  bool reverse_, packed_;
  // Of packed sequences alone:
  std::vector<std::int64_t> offsets_;  // cu_seqlens
  std::vector<std::int64_t> begins_;   // (processes + 1) of blocks
  bool initial_state_needs_gradient_ = false;
};

}  // namespace gateloop::distributed
