// One head of attention: rotary positions, relative scales, the cache, scores.
#include <algorithm>
#include <cmath>
#include <complex>

#include "runtime/mixing.h"
#include "runtime/rows.h"

namespace gateloop::runtime {
namespace {

using namespace recurrence;

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

/// Channels 2c and 2c + 1 of q and k of heads [first, last) turn by position · frequency. The angle
/// is a double: in float32 its rounding alone would be 6e-5 at position 1000.
void Mixing::rotate(float* row, std::int64_t first, std::int64_t last,
                    std::int64_t position) const {
  const std::int64_t d = attention_->dim_head;
  for (std::int64_t c = 0; c < d / 2; ++c) {
    const double angle = static_cast<double>(position) * static_cast<double>(stage_.rotary[c]);
    const auto cos = static_cast<float>(std::cos(angle)), sin = static_cast<float>(std::sin(angle));
    for (float* const channels : {row, row + width_}) {
      for (std::int64_t head = first; head < last; ++head) {
        float* const pair = channels + head * d + 2 * c;
        const float x = pair[0], y = pair[1];
        pair[0] = x * cos - y * sin;
        pair[1] = y * cos + x * sin;
      }
    }
  }
}

/// q and k of one head of a row as their product takes them.
void Mixing::place(const model::AttentionSpec& spec, float* row, std::int64_t head,
                   float* scratch) const {
  if (!spec.data_dependent_rel_pos || spec_.ablation.state_transition) return;
  const std::int64_t d = spec.dim_head;
  float* const q = row + head * d;
  const float* const z = row + z_ + head * d;
  for (std::int64_t c = 0; c < d; ++c) scratch[c] = spec_.ablation.complex && c % 2 == 1 ? 0 : z[c];
  polar_gate_row(scratch, scratch, d / 2);
  scale_relative(q, q + width_, scratch, d);
}

/// Steps of one sequence with a window that are computed together. Their keys, and those before
/// them that they read, are copied: the ring has another order.
struct Mixing::Windowed {
  std::int64_t before, steps;

  std::int64_t numbers(std::int64_t dim_head) const { return padded((before + steps) * dim_head); }
};

Mixing::Windowed Mixing::windowed(std::int64_t sequence, std::int64_t first) const {
  constexpr std::int64_t kMostSteps = 256;
  return {std::min(position(sequence) + first, *attention_->window - 1),
          std::min(kMostSteps, rows_.runs.steps(sequence) - first)};
}

std::int64_t Mixing::attention_scratch(std::int64_t sequence) const {
  const model::AttentionSpec& spec = *attention_;
  const std::int64_t own = padded(spec.dim_head), time = rows_.runs.steps(sequence);
  if (time == 0) return 0;
  if (!in_windows(sequence)) {
    const std::int64_t stored = spec.window ? layer_.steps->capacity() : position(sequence) + 1;
    return own + scratch_numbers({.queries = time, .count = stored});
  }
  const std::int64_t most = *spec.window - 1, steps = windowed(sequence, 0).steps;
  const Windowed piece{std::min(position(sequence) + time, most), steps};
  return own + 2 * piece.numbers(spec.dim_head) +
         scratch_numbers({.queries = steps, .count = piece.before + 1, .window = *spec.window});
}

/// Where one head of one sequence keeps its keys and values.
struct Mixing::Stored {
  std::int64_t dim_head, window;
  float *keys, *values;

  /// Of a step: in a ring where there is a window.
  std::int64_t at(std::int64_t step) const {
    return (window > 0 ? step % window : step) * dim_head;
  }
};

void Mixing::attend(std::int64_t sequence, std::int64_t head, std::int64_t first, AttentionHead p,
                    float* scratch) const {
  const std::int64_t d = attention_->dim_head, row = rows_.runs.first(sequence) + first;
  p.dim_head = d;
  p.softmax = attention_->softmax_normalize;
  p.q = products(row) + head * d;
  p.q_stride = rows_.products_stride;
  p.y = rows_.y + row * rows_.y_stride + head * d;
  p.y_stride = rows_.y_stride;
  run(p, scratch);
}

template <class Store>
void Mixing::attend_windows(std::int64_t sequence, std::int64_t head, const Stored& stored,
                            const Store& store, float* room) const {
  const std::int64_t d = stored.dim_head;
  for (std::int64_t first = 0; first < rows_.runs.steps(sequence);) {
    const Windowed piece = windowed(sequence, first);
    const std::int64_t oldest = position(sequence) + first - piece.before;
    float *const keys = room, *const values = keys + piece.numbers(d);
    for (std::int64_t i = 0; i < piece.before; ++i) {
      std::copy_n(stored.keys + stored.at(oldest + i), d, keys + i * d);
      std::copy_n(stored.values + stored.at(oldest + i), d, values + i * d);
    }
    for (std::int64_t i = piece.before; i < piece.before + piece.steps; ++i) {
      store(first + i - piece.before, keys + i * d, values + i * d);
      std::copy_n(keys + i * d, d, stored.keys + stored.at(oldest + i));
      std::copy_n(values + i * d, d, stored.values + stored.at(oldest + i));
    }
    attend(sequence, head, first,
           {.queries = piece.steps,
            .count = piece.before + 1,
            .window = stored.window,
            .keys = keys,
            .values = values},
           values + piece.numbers(d));
    first += piece.steps;
  }
}

void Mixing::attend_head(const model::AttentionSpec& spec, std::int64_t sequence, std::int64_t head,
                         float* scratch) const {
  const std::int64_t d = spec.dim_head;
  const std::int64_t base = (sequence * spec.heads + head) * layer_.steps->capacity() * d;
  const Stored stored{d, spec.window.value_or(0), layer_.steps->keys.data() + base,
                      layer_.steps->values.data() + base};
  float* const room = scratch + padded(d);
  const auto store = [&](std::int64_t t, float* keys, float* values) {
    float* const row = products(rows_.runs.first(sequence) + t);
    place(spec, row, head, scratch);
    std::copy_n(row + width_ + head * d, d, keys);
    std::copy_n(row + 2 * width_ + head * d, d, values);
  };
  if (in_windows(sequence)) return attend_windows(sequence, head, stored, store, room);
  const std::int64_t time = rows_.runs.steps(sequence);
  for (std::int64_t t = 0; t < time; ++t) {
    const std::int64_t at = stored.at(position(sequence) + t);
    store(t, stored.keys + at, stored.values + at);
  }
  const std::int64_t steps = position(sequence) + 1;
  attend(sequence, head, 0,
         {.queries = time,
          .count = spec.window ? std::min(steps, *spec.window) : steps,
          .keys = stored.keys,
          .values = stored.values},
         room);
}

}  // namespace gateloop::runtime
