#include "runtime/rows.h"

namespace gateloop::runtime {

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
