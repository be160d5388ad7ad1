#include "runtime/formats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "recurrence/cpu/half.h"

namespace gateloop::runtime {
namespace {

using recurrence::Storage;

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

float float_from_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t bfloat16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void read_row(const StoredMatrix& m, std::int64_t row, float* to) {
  if (m.dtype != "I8") {
    const auto element = m.dtype == "F64" ? 8 : m.dtype == "F32" ? 4 : 2;
    return read_floats(m.dtype, m.data + row * m.columns * element, m.columns, to);
  }
  const auto scale = load<float>(m.scales + row * std::int64_t{sizeof(float)});
  const std::byte* const from = m.data + row * m.columns;
  for (std::int64_t c = 0; c < m.columns; ++c) {
    to[c] = scale * static_cast<float>(static_cast<std::int8_t>(from[c]));
  }
}

template <class T, class F>
void store(std::byte* to, const std::vector<float>& row, const F& narrow) {
  for (const float value : row) {
    const T narrowed = narrow(value);
    std::memcpy(to, &narrowed, sizeof narrowed);
    to += sizeof narrowed;
  }
}

/// Returns the scale. A number that is not finite makes it so, and the row is lost.
float store_int8(std::byte* to, const std::vector<float>& row) {
  float most = 0;
  for (const float value : row) {
    if (!std::isfinite(value)) most = std::numeric_limits<float>::quiet_NaN();
    most = std::max(most, std::fabs(value));
  }
  const float scale = most / 127;
  store<std::int8_t>(to, row, [&](float value) {
    if (!(scale > 0)) return std::int8_t{0};
    const double steps = std::nearbyint(static_cast<double>(value) / static_cast<double>(scale));
    return static_cast<std::int8_t>(std::clamp(steps, -127.0, 127.0));
  });
  return scale;
}

}  // namespace

void read_floats(std::string_view dtype, const std::byte* from, std::int64_t n, float* to) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (dtype == "F64") {
      to[i] = static_cast<float>(load<double>(from + 8 * i));
    } else if (dtype == "F32") {
      to[i] = load<float>(from + 4 * i);
    } else if (dtype == "BF16") {
      to[i] = float_from_bfloat16(load<std::uint16_t>(from + 2 * i));
    } else {
      to[i] = recurrence::cpu::float_from_half(load<std::uint16_t>(from + 2 * i));
    }
  }
}

Converted convert(const StoredMatrix& from, Storage to) {
  const auto row_bytes = static_cast<std::size_t>(from.columns) * recurrence::storage_bytes(to);
  Converted out;
  out.data.resize(static_cast<std::size_t>(from.rows) * row_bytes);
  std::vector<float> row(static_cast<std::size_t>(from.columns));
  for (std::int64_t r = 0; r < from.rows; ++r) {
    read_row(from, r, row.data());
    std::byte* const at = out.data.data() + static_cast<std::size_t>(r) * row_bytes;
    switch (to) {
      case Storage::kFloat32:
        store<float>(at, row, [](float value) { return value; });
        break;
      case Storage::kBFloat16:
        store<std::uint16_t>(at, row, bfloat16_from_float);
        break;
      case Storage::kFloat16:
        store<std::uint16_t>(at, row, recurrence::cpu::half_from_float);
        break;
      case Storage::kInt8:
        out.scales.push_back(store_int8(at, row));
        break;
    }
  }
  return out;
}

Storage storage_of(Format format, std::string_view dtype) {
  switch (format) {
    case Format::kFile:
      break;
    case Format::kFloat32:
      return Storage::kFloat32;
    case Format::kBFloat16:
      return Storage::kBFloat16;
    case Format::kFloat16:
      return Storage::kFloat16;
    case Format::kInt8:
      return Storage::kInt8;
  }
  if (dtype == "BF16") return Storage::kBFloat16;
  if (dtype == "F16") return Storage::kFloat16;
  return dtype == "I8" ? Storage::kInt8 : Storage::kFloat32;
}

std::string dtype_of(Storage storage) {
  constexpr const char* kNames[] = {"F32", "BF16", "F16", "I8"};
  return kNames[static_cast<std::size_t>(storage)];
}

}  // namespace gateloop::runtime
