#pragma once

/// IEEE half precision in integer arithmetic, for the target without F16C: Highway 1.0.3's scalar
/// fallback truncates and loses sign, infinity and NaN.
#include <bit>
#include <cmath>
#include <cstdint>

namespace gateloop::recurrence::cpu {

inline float float_from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  // Halves are floats with an exponent 112 lower. A subnormal half is a multiple of 2^-24: as bits
  // of a float it would be subnormal too, which reads as zero where subnormals are flushed.
  const float value = magnitude < 0x400u ? static_cast<float>(magnitude) * 0x1p-24f
                                         : std::bit_cast<float>((magnitude << 13) + (112u << 23));
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

/// Rounds to nearest even.
inline std::uint16_t half_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::fabs(value);
  if (!(magnitude < 65520.0f)) {  // 65520 is halfway between the largest half and the next
    return static_cast<std::uint16_t>(sign | (std::isnan(value) ? 0x7E00u : 0x7C00u));
  }
  if (magnitude < 0x1p-14f) {
    // Subnormal: adding 0.5 leaves the multiple of 2^-24, rounded, in the low mantissa bits.
    const auto rounded = std::bit_cast<std::uint32_t>(magnitude + 0.5f) - 0x3F000000u;
    return static_cast<std::uint16_t>(sign | rounded);
  }
  std::uint32_t m = std::bit_cast<std::uint32_t>(magnitude) - (112u << 23);
  m += 0xFFFu + (m >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | m >> 13);
}

}  // namespace gateloop::recurrence::cpu
