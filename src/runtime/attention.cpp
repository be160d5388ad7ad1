// One head of attention: rotary positions, relative scales, the cache, scores.
#include <algorithm>
#include <cmath>
#include <complex>

#include "runtime/mixing.h"
#include "runtime/rows.h"

namespace gateloop::runtime {
namespace {

using namespace recurrence;

/// Channels 2c and 2c + 1 of q and k turn by position · frequency. The angle is a double: in
/// float32 its rounding alone would be 6e-5 at position 1000.
void rotate(float* q, float* k, std::int64_t dim_head, const float* frequencies,
            std::int64_t position) {
  for (std::int64_t c = 0; c < dim_head / 2; ++c) {
    const double angle = static_cast<double>(position) * static_cast<double>(frequencies[c]);
    const auto cos = static_cast<float>(std::cos(angle)), sin = static_cast<float>(std::sin(angle));
    for (float* pair : {q + 2 * c, k + 2 * c}) {
      const float x = pair[0], y = pair[1];
      pair[0] = x * cos - y * sin;
      pair[1] = y * cos + x * sin;
    }
  }
}

/// Scales pair c of q by max(Re(a_0 ... a_c), 1e-10), and that of k by the inverse. `a`: (dim_head
/// / 2) pairs (re, im).
void scale_relative(float* q, float* k, const float* a, std::int64_t dim_head) {
  std::complex<double> product = 1;
  for (std::int64_t c = 0; c < dim_head; c += 2) {
    product *= std::complex<double>(static_cast<double>(a[c]), static_cast<double>(a[c + 1]));
    const auto scale = static_cast<float>(std::max(product.real(), 1e-10));
    for (const std::int64_t i : {c, c + 1}) q[i] *= scale, k[i] /= scale;
  }
}

}  // namespace

/// q and k of one head of a row as their product takes them.
void Mixing::place(const model::AttentionSpec& spec, float* row, std::int64_t head,
                   std::int64_t position, float* scratch) const {
  const std::int64_t d = spec.dim_head;
  float* const q = row + head * d;
  float* const k = q + width_;
  if (stage_.rotary != nullptr) rotate(q, k, d, stage_.rotary, position);
  if (!spec.data_dependent_rel_pos || spec_.ablation.state_transition) return;
  const float* const z = row + z_ + head * d;
  for (std::int64_t c = 0; c < d; ++c) scratch[c] = spec_.ablation.complex && c % 2 == 1 ? 0 : z[c];
  polar_gate_row(scratch, scratch, d / 2);
  scale_relative(q, k, scratch, d);
}

/// With a window step by step: its ring overwrites what later steps no longer read.
void Mixing::attend_head(const model::AttentionSpec& spec, std::int64_t sequence, std::int64_t head,
                         float* scratch) const {
  const std::int64_t d = spec.dim_head;
  const std::int64_t base = (sequence * spec.heads + head) * layer_.steps->capacity() * d;
  float* const keys = layer_.steps->keys.data() + base;
  float* const values = layer_.steps->values.data() + base;
  const auto attend = [&](std::int64_t row, std::int64_t queries, std::int64_t count) {
    run({.queries = queries,
         .count = count,
         .dim_head = d,
         .softmax = spec.softmax_normalize,
         .q = products(row) + head * d,
         .q_stride = rows_.products_stride,
         .keys = keys,
         .values = values,
         .y = rows_.y + row * rows_.y_stride + head * d,
         .y_stride = rows_.y_stride},
        scratch + padded(d));
  };
  for (std::int64_t t = 0; t < rows_.time; ++t) {
    const std::int64_t position = state_.position + t, r = sequence * rows_.time + t;
    float* const row = products(r);
    place(spec, row, head, position, scratch);
    const std::int64_t slot = spec.window ? position % *spec.window : position;
    std::copy_n(row + width_ + head * d, d, keys + slot * d);
    std::copy_n(row + 2 * width_ + head * d, d, values + slot * d);
    if (spec.window) attend(r, 1, std::min(position + 1, *spec.window));
  }
  if (!spec.window) attend(sequence * rows_.time, rows_.time, state_.position + 1);
}

}  // namespace gateloop::runtime
