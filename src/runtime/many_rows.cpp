#include "runtime/many_rows.h"

#include <algorithm>
#include <vector>

#include "recurrence/cpu/parallel.h"
#include "runtime/mixing.h"

namespace gateloop::runtime {

using namespace recurrence;

/// The rows of one call. `in` of a stage begins where that of its first row does.
struct ManyRows::Pass {
  RowSizes sizes;
  std::int64_t dim;
  Runs runs;
  std::int64_t rows;
  float* own;
  float* shared;
  const Executor& executor;
  int threads = std::max(1, executor.threads);

  Row row(std::int64_t index) const { return sizes.row(own, shared, rows, index); }

  template <class Body>
  void for_each_row(const Body& body) const {
    cpu::parallel(executor, threads, rows, [&](std::int64_t r, std::int64_t) { body(r); });
  }
};

void ManyRows::project(const Stage& stage, const Pass& pass, float* to, std::int64_t stride) {
  const Row first = pass.row(0);
  pass.for_each_row([&](std::int64_t r) { make_input(stage, pass.row(r), pass.dim); });
  const float* const in = input_of(stage, first);
  const std::int64_t in_stride = in == first.hidden ? pass.sizes.hidden
                                 : in == first.x    ? pass.sizes.x
                                                    : pass.sizes.in;
  for (const Projection& p : stage.projections) {
    const Product product{.matrix = p.matrix,
                          .rows = pass.rows,
                          .x = in,
                          .x_stride = in_stride,
                          .bias = p.bias,
                          .y = to + p.column,
                          .y_stride = stride};
    recurrence::run(product, pass.executor, products_.bytes(scratch_bytes(product, pass.threads)));
  }
}

void ManyRows::mix(const Stage& stage, const Pass& pass, StateData& state, const float* ones) {
  const Row first = pass.row(0);
  const bool simple = stage.output == Output::kSimple;
  const Mixing mixing(network_, stage, state,
                      {.runs = pass.runs,
                       .products = first.products,
                       .products_stride = pass.sizes.products,
                       .y = simple ? first.simple : first.mixed,
                       .y_stride = simple ? pass.sizes.x : pass.sizes.mixed},
                      ones);
  pass.for_each_row([&](std::int64_t r) { mixing.prepare_row(r, 0, stage.groups); });
  if (mixing.scans()) {
    void* const scratch = mixing_.bytes(mixing.scan_scratch_bytes(pass.threads));
    float* const next = next_.floats(mixing.state_numbers());
    const std::int64_t channels = simple ? pass.dim : stage.groups;
    return mixing.scan(0, channels, pass.executor, next, scratch);
  }
  const std::int64_t each = mixing.head_scratch();
  float* const scratch = mixing_.floats(each * pass.threads + 1);
  cpu::parallel(pass.executor, pass.threads, pass.runs.batch * stage.groups,
                [&](std::int64_t item, std::int64_t slot) {
                  mixing.head(item / stage.groups, item % stage.groups, scratch + slot * each);
                });
}

void ManyRows::read_out(const Stage& stage, const Pass& pass, const Call& call) {
  const std::int64_t tokens = network_.num_tokens();
  if (!call.last_only) return read_out_all(stage, pass, call);
  // The sums that are read move to the front: of packed sequences some have no steps here.
  Pass read = pass;
  read.rows = 0;
  std::vector<std::int64_t> sequences;
  for (std::int64_t b = 0; b < pass.runs.batch; ++b) {
    if (pass.runs.steps(b) == 0) continue;
    const Row last = pass.row(pass.runs.first(b + 1) - 1), to = pass.row(read.rows++);
    if (last.sum != to.sum) std::copy_n(last.sum, pass.dim, to.sum);
    sequences.push_back(b);
  }
  if (read.rows == pass.runs.batch && call.logits_stride == tokens)
    return project(stage, read, call.logits, tokens);
  float* const logits = logits_.floats(read.rows * tokens);
  project(stage, read, logits, tokens);
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    std::copy_n(logits + static_cast<std::int64_t>(i) * tokens, tokens,
                call.logits + sequences[i] * call.logits_stride);
  }
}

void ManyRows::read_out_all(const Stage& stage, const Pass& pass, const Call& call) {
  const std::int64_t tokens = network_.num_tokens(), each = pass.runs.time * tokens;
  if (pass.runs.packed() || call.logits_stride == each)
    return project(stage, pass, call.logits, tokens);
  float* const logits = logits_.floats(pass.rows * tokens);
  project(stage, pass, logits, tokens);
  for (std::int64_t b = 0; b < pass.runs.batch; ++b)
    std::copy_n(logits + b * each, each, call.logits + b * call.logits_stride);
}

void ManyRows::run(const Call& call, StateData& state, const float* ones,
                   const Executor& executor) {
  const RowSizes sizes(network_);
  const std::int64_t rows = call.runs.rows();
  float* const memory = rows_.floats(rows * (sizes.own() + sizes.shared()));
  const Pass pass{.sizes = sizes,
                  .dim = network_.dim(),
                  .runs = call.runs,
                  .rows = rows,
                  .own = memory,
                  .shared = memory + rows * sizes.own(),
                  .executor = executor};
  pass.for_each_row(
      [&](std::int64_t r) { widen_row(network_.embedding(), call.token(r), pass.row(r).sum); });
  for (const Stage& stage : network_.stages()) {
    switch (stage.output) {
      case Output::kLogits:
        read_out(stage, pass, call);
        break;
      case Output::kSum:
      case Output::kHidden: {
        const bool hidden = stage.output == Output::kHidden;
        const Row first = pass.row(0);
        project(stage, pass, hidden ? first.hidden : first.sum, hidden ? sizes.hidden : sizes.x);
        pass.for_each_row([&](std::int64_t r) {
          const Row row = pass.row(r);
          finish_row(stage, row, row.in, 0, stage.groups);
        });
        break;
      }
      default:
        project(stage, pass, pass.row(0).products, sizes.products);
        mix(stage, pass, state, ones);
    }
  }
}

}  // namespace gateloop::runtime
