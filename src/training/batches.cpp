#include "training/batches.h"

#include <algorithm>

namespace gateloop::training {
namespace {

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

std::int64_t Batches::start(std::int64_t step, std::int64_t row) const {
  const std::uint64_t random =
      mix(mix(mix(seed_) ^ static_cast<std::uint64_t>(step)) ^ static_cast<std::uint64_t>(row));
  const std::uint64_t places = text_.size() - static_cast<std::uint64_t>(length_);
  // The high half of a 128-bit product is uniform to within places / 2^64.
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::int64_t>((static_cast<Wide>(random) * places) >> 64);
}

torch::Tensor Batches::at(std::int64_t step, std::int64_t first, std::int64_t last) const {
  torch::Tensor ids = torch::empty({last - first, length_ + 1}, torch::kInt64);
  auto* out = ids.data_ptr<std::int64_t>();
  for (std::int64_t row = first; row < last; ++row) {
    out = std::copy_n(text_.begin() + start(step, row), length_ + 1, out);
  }
  return ids;
}

}  // namespace gateloop::training
