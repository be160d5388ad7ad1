#include "runtime/one_row.h"

#include <algorithm>
#include <array>

#include "recurrence/cpu/phases.h"
#include "runtime/mixing.h"
#include "runtime/rows.h"

namespace gateloop::runtime {
namespace {

using namespace recurrence;

constexpr std::int64_t kFloat = sizeof(float);

/// A unit's own numbers: its row, and its input arranged for each storage.
std::int64_t own_numbers(const RowSizes& sizes) { return sizes.own() + kStorages * sizes.in; }

MixRows mix_rows(const Stage& stage, const Row& row) {
  return {.runs = {.batch = 1, .time = 1},
          .products = row.products,
          .y = stage.output == Output::kSimple ? row.simple : row.mixed};
}

/// Projections of groups [first, last), to `to`.
void multiply(const Stage& stage, const std::array<const void*, kStorages>& in, std::int64_t first,
              std::int64_t last, float* to) {
  for (const Projection& p : stage.projections) {
    const std::int64_t block = p.matrix.rows / p.blocks;
    for (std::int64_t b = 0; b < p.blocks; ++b) {
      const std::int64_t begin = b * block + first * p.per_group;
      multiply_rows(p.matrix, in[static_cast<std::size_t>(p.matrix.storage)], begin,
                    b * block + last * p.per_group, p.bias, to + p.column + begin);
    }
  }
}

}  // namespace

struct OneRow::Unit {
  Row row;
  float* arranged;
};

OneRow::OneRow(const Network& network, int threads) : network_(network), units_(threads) {
  const RowSizes sizes(network);
  float* const rows = rows_.floats(sizes.shared() + units_ * own_numbers(sizes));
  std::fill_n(rows, sizes.shared(), 0.0f);
  phases_.bytes(cpu::Phases::bytes(units_));
}

OneRow::Unit OneRow::unit(std::int64_t index) const {
  const RowSizes sizes(network_);
  auto* const shared = static_cast<float*>(rows_.get());
  float* const own = shared + sizes.shared() + index * own_numbers(sizes);
  return {sizes.row(own, shared, 1, 0), own + sizes.own()};
}

void OneRow::run_stage(const Stage& stage, std::int64_t index, StateData& state, const float* ones,
                       float* logits) const {
  const auto [row, memory] = unit(index);
  const std::int64_t in_size = RowSizes(network_).in;
  const float* const in = make_input(stage, row, network_.dim());
  std::array<const void*, kStorages> arranged{};
  for (const Projection& p : stage.projections) {
    const auto storage = static_cast<std::size_t>(p.matrix.storage);
    if (arranged[storage] != nullptr) continue;
    void* const to = memory + static_cast<std::int64_t>(storage) * in_size;
    arrange(p.matrix.storage, in, stage.input_width, to);
    arranged[storage] = to;
  }
  const std::int64_t granules = (stage.groups + stage.granule - 1) / stage.granule;
  const std::int64_t first = std::min(stage.groups, granules * index / units_ * stage.granule);
  const std::int64_t last = std::min(stage.groups, granules * (index + 1) / units_ * stage.granule);
  float* const to = stage.output == Output::kSum      ? row.sum
                    : stage.output == Output::kHidden ? row.hidden
                    : stage.output == Output::kLogits ? logits
                                                      : row.products;
  multiply(stage, arranged, first, last, to);
  if (!mixes(stage.output)) return finish_row(stage, row, in, first, last);

  const Mixing mixing(network_, stage, state, mix_rows(stage, row), ones);
  auto* const scratch = static_cast<std::byte*>(mixing_.get()) + index * mixing_bytes_;
  mixing.prepare_row(0, first, last);
  if (mixing.scans()) {
    auto* const next = reinterpret_cast<float*>(scratch);
    mixing.scan(first, last, {}, next, next + padded(mixing.state_numbers()));
  } else {
    for (std::int64_t head = first; head < last; ++head)
      mixing.head(0, head, reinterpret_cast<float*>(scratch));
  }
}

void OneRow::step(std::int64_t token, StateData& state, const float* ones, const Executor& executor,
                  float* logits) {
  // Keys and values grow: so does the room for their scores.
  const Row first = unit(0).row;
  std::int64_t bytes = 0;
  for (const Stage& stage : network_.stages()) {
    if (!mixes(stage.output)) continue;
    const Mixing mixing(network_, stage, state, mix_rows(stage, first), ones);
    const std::int64_t needed = mixing.scans()
                                    ? kFloat * padded(mixing.state_numbers()) +
                                          static_cast<std::int64_t>(mixing.scan_scratch_bytes(1))
                                    : kFloat * mixing.head_scratch();
    bytes = std::max(bytes, needed);
  }
  mixing_bytes_ = kFloat * padded(bytes / kFloat + 1);
  mixing_.bytes(static_cast<std::size_t>(units_ * mixing_bytes_));

  widen_row(network_.embedding(), token, first.sum);
  cpu::Phases phases(phases_.get(), units_);
  phases.run(executor, static_cast<std::int64_t>(network_.stages().size()),
             [&](std::int64_t stage, std::int64_t index) {
               run_stage(network_.stages()[static_cast<std::size_t>(stage)], index, state, ones,
                         logits);
             });
}

}  // namespace gateloop::runtime
