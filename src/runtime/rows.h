#pragma once

/// The rows that stages read and write, one for each token.
#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

#include "runtime/network.h"

namespace gateloop::runtime {

/// Whole cache lines of float32.
constexpr std::int64_t padded(std::int64_t n) { return (n + 15) / 16 * 16; }

/// The rows of B sequences, one after another: `time` of each, or packed, which differ in length.
struct Runs {
  std::int64_t batch = 0;
  std::int64_t time = 0;
  std::span<const std::int64_t> starts = {};  ///< (B + 1) where packed, the first 0

  bool packed() const { return !starts.empty(); }
  std::int64_t first(std::int64_t sequence) const {
    return packed() ? starts[static_cast<std::size_t>(sequence)] : sequence * time;
  }
  std::int64_t steps(std::int64_t sequence) const { return first(sequence + 1) - first(sequence); }
  std::int64_t rows() const { return first(batch); }
  std::int64_t sequence_of(std::int64_t row) const {
    if (!packed()) return row / time;
    return std::upper_bound(starts.begin(), starts.end(), row) - starts.begin() - 1;
  }
};

/// Throws std::invalid_argument naming `function` where cu_seqlens do not rise from 0 to `count`,
/// with one sequence at least and a token in each.
void check_cu_seqlens(const std::string& function, std::span<const std::int64_t> cu_seqlens,
                      std::int64_t count);

/// Of one token. `x` and `in` belong to whoever computes the row.
struct Row {
  float* x = nullptr;         ///< (dim) residual stream
  float* in = nullptr;        ///< (input) of the products
  float* sum = nullptr;       ///< (dim) residual stream and what was added
  float* products = nullptr;  ///< (products)
  float* mixed = nullptr;     ///< (mixed) result of the mixer
  float* simple = nullptr;    ///< (dim) result of a simple gate loop
  float* hidden = nullptr;    ///< (hidden)
};

/// Numbers from a row to the next.
struct RowSizes {
  std::int64_t x, in, products, mixed, hidden;

  explicit RowSizes(const Network& network)
      : x(padded(network.dim())),
        in(padded(network.widths().input)),
        products(padded(network.widths().products)),
        mixed(padded(network.widths().mixed)),
        hidden(padded(network.widths().hidden)) {}

  /// What threads share, and what belongs to who computes the row.
  std::int64_t shared() const { return 2 * x + products + mixed + hidden; }
  std::int64_t own() const { return x + in; }

  Row row(float* own, float* shared, std::int64_t count, std::int64_t index) const {
    float* const sum = shared + index * x;
    float* const simple = shared + count * x + index * x;
    float* const after = shared + 2 * count * x;
    return {.x = own + index * x,
            .in = own + count * x + index * in,
            .sum = sum,
            .products = after + index * products,
            .mixed = after + count * products + index * mixed,
            .simple = simple,
            .hidden = after + count * (products + mixed) + index * hidden};
  }
};

/// Where the stage's products read, (input_width).
const float* input_of(const Stage& stage, const Row& row);
/// Makes what they read there, and returns where.
const float* make_input(const Stage& stage, const Row& row, std::int64_t dim);

/// Channels [first, last) of a stage whose result needs its own row alone: kSum, kHidden. `in`:
/// what make_input gave.
void finish_row(const Stage& stage, const Row& row, const float* in, std::int64_t first,
                std::int64_t last);

}  // namespace gateloop::runtime
