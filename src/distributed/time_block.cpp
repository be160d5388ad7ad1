#include "distributed/time_block.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "distributed/group.h"
#include "ops/offsets.h"

namespace gateloop::distributed {

std::vector<at::Tensor> Piece::of(at::TensorList sequences) const {
  std::vector<at::Tensor> parts;
  for (const auto& sequence : sequences) parts.push_back(of(sequence));
  return parts;
}

TimeBlock::TimeBlock(const char* op, c10::intrusive_ptr<c10d::ProcessGroup> group,
                     const at::Tensor& sequence, bool reverse, const OptionalTensor& cu_seqlens,
                     bool initial_state_needs_gradient)
    : group_(std::move(group)),
      rows_(sequence.size(0)),
      steps_(sequence.size(1)),
      reverse_(reverse),
      packed_(ops::is_given(cu_seqlens)) {
  if (!packed_) return;
  const at::Tensor own = at::tensor({steps_, std::int64_t{initial_state_needs_gradient}},
                                    sequence.options().dtype(at::kLong));
  const auto all = Gathering(*group_, {own}).wait();
  begins_ = {0};
  for (const auto& block : all) begins_.push_back(begins_.back() + block[0][0].item().toLong());
  offsets_ = ops::sequence_offsets(op, cu_seqlens, begins_.back());
  rows_ = static_cast<std::int64_t>(offsets_.size()) - 1;
  const std::int64_t first_rank = reverse_ ? blocks() - 1 : 0;
  initial_state_needs_gradient_ = all[static_cast<std::size_t>(first_rank)][0][1].item().toBool();
}

Piece TimeBlock::at_edge(std::int64_t steps, bool right) const {
  return right ? Piece{steps_ - steps, steps_} : Piece{0, steps};
}

OptionalTensor TimeBlock::cu_seqlens(const Piece& piece) const {
  if (!packed_) return {};
  const std::int64_t begin = begins_[static_cast<std::size_t>(group_->getRank())] + piece.begin;
  std::vector<std::int64_t> within;
  for (const std::int64_t offset : offsets_) {
    within.push_back(std::clamp<std::int64_t>(offset - begin, 0, piece.steps()));
  }
  return at::tensor(within, at::kLong);
}

std::vector<std::int64_t> TimeBlock::beyond(const Piece& piece, bool crossing_right,
                                            bool all) const {
  if (piece == whole()) return {};
  std::vector<std::int64_t> rows(static_cast<std::size_t>(rows_));
  std::iota(rows.begin(), rows.end(), 0);
  if (!packed_) return rows;
  const std::int64_t begin = begins_[static_cast<std::size_t>(group_->getRank())];
  std::erase_if(rows, [&](std::int64_t row) {
    const auto n = static_cast<std::size_t>(row);
    const std::int64_t from = offsets_[n] - begin, to = offsets_[n + 1] - begin;
    const bool crosses = crossing_right ? to > steps_ : from < 0;
    const std::int64_t here_from = std::max<std::int64_t>(from, 0), here_to = std::min(to, steps_);
    const bool outside = here_from < here_to && (here_from < piece.begin || here_to > piece.end);
    return !outside || !(all || crosses);
  });
  return rows;
}

std::vector<std::int64_t> TimeBlock::leaving_beyond(const Piece& piece) const {
  return beyond(piece, !reverse_, /*all=*/false);
}

std::vector<std::int64_t> TimeBlock::entering_beyond(const Piece& piece) const {
  return beyond(piece, reverse_, initial_state_needs_gradient_);
}

std::vector<std::int64_t> TimeBlock::ending_ranks() const {
  std::vector<std::int64_t> ranks;
  for (std::size_t n = 0; n + 1 < offsets_.size(); ++n) {
    const std::int64_t from = offsets_[n], to = offsets_[n + 1];
    std::int64_t rank = reverse_ ? blocks() - 1 : 0;
    if (from < to) {
      const std::int64_t step = reverse_ ? from : to - 1;  // the one that is read last
      rank = std::upper_bound(begins_.begin(), begins_.end(), step) - begins_.begin() - 1;
    }
    ranks.push_back(rank);
  }
  return ranks;
}

}  // namespace gateloop::distributed
