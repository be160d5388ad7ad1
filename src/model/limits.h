#pragma once

#include <cstdint>

namespace gateloop::model {

/// Far above any model; products of two sizes and a few more then fit 64 bits.
inline constexpr std::int64_t kMostOfASize = std::int64_t{1} << 30;
/// A damaged file's depth must not take all memory for its description.
inline constexpr std::int64_t kMostLayers = std::int64_t{1} << 16;

}  // namespace gateloop::model
