#include "runtime/rows.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace gateloop::runtime {

void check_cu_seqlens(const std::string& function, std::span<const std::int64_t> cu_seqlens,
                      std::int64_t count) {
  std::string problem;
  if (cu_seqlens.size() < 2) {
    problem = std::to_string(cu_seqlens.size()) + " numbers";
  } else if (cu_seqlens.front() != 0 || cu_seqlens.back() != count) {
    problem = std::to_string(cu_seqlens.front()) + " to " + std::to_string(cu_seqlens.back());
  } else {
    const auto last =
        std::adjacent_find(cu_seqlens.begin(), cu_seqlens.end(), std::greater_equal());
    if (last == cu_seqlens.end()) return;
    problem = std::to_string(last[1]) + " after " + std::to_string(last[0]);
  }
  throw std::invalid_argument(function + ": cu_seqlens must rise from 0 to the count of ids, " +
                              std::to_string(count) + ", got " + problem);
}

using namespace recurrence;

const float* input_of(const Stage& stage, const Row& row) {
  if (stage.input == Input::kHidden) return row.hidden;
  return stage.input == Input::kMixed || stage.before.gain != nullptr ? row.in : row.x;
}

const float* make_input(const Stage& stage, const Row& row, std::int64_t dim) {
  switch (stage.input) {
    case Input::kSum:
      apply(stage.after, row.sum, dim, row.x);
      break;
    case Input::kSimple:
      if (stage.after.gain != nullptr) {
        apply(stage.after, row.simple, dim, row.in);
        add_row(row.in, row.x, dim);
      } else {
        add_row(row.simple, row.x, dim);
      }
      break;
    case Input::kMixed:
      apply(stage.after, row.mixed, stage.input_width, row.in);
      if (stage.gates >= 0) multiply_row(row.products + stage.gates, row.in, stage.input_width);
      break;
    case Input::kHidden:
      break;
  }
  if (stage.before.gain != nullptr) apply(stage.before, row.x, dim, row.in);
  return input_of(stage, row);
}

void finish_row(const Stage& stage, const Row& row, const float* in, std::int64_t first,
                std::int64_t last) {
  const std::int64_t n = last - first;
  if (stage.output == Output::kHidden) return gelu_row(row.hidden + first, n);
  if (stage.output != Output::kSum) return;
  if (stage.projections.empty()) std::copy_n(in + first, n, row.sum + first);
  add_row(row.x + first, row.sum + first, n);
}

}  // namespace gateloop::runtime
