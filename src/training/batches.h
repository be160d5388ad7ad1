#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <span>

namespace gateloop::training {

/// Random windows of a text. A pure function of (seed, step, row): no generator state to save, and
/// a resumed run draws what the unbroken one would have.
class Batches {
 public:
  /// Windows of length + 1 bytes: `length` to read, each predicting the next.
  Batches(std::span<const std::uint8_t> text, std::int64_t length, std::uint64_t seed)
      : text_(text), length_(length), seed_(seed) {}

  /// First byte of the window, uniform over all places where one fits.
  std::int64_t start(std::int64_t step, std::int64_t row) const;
  /// Rows `first` to `last` - 1 of a step: ids (last - first, length + 1) int64.
  torch::Tensor at(std::int64_t step, std::int64_t first, std::int64_t last) const;

 private:
  std::span<const std::uint8_t> text_;
  std::int64_t length_;
  std::uint64_t seed_;
};

}  // namespace gateloop::training
