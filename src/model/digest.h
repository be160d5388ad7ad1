#pragma once

#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace gateloop::model {

/// FNV-1a of 64 bits: finds damage and mistakes, not forgery.
class Digest {
 public:
  void add(const void* data, std::size_t bytes) {
    const auto* const from = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < bytes; ++i) hash_ = (hash_ ^ from[i]) * 0x100000001b3;
  }
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325;
};

/// 16 digits.
inline std::string hexadecimal(std::uint64_t digest) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016" PRIx64, digest);
  return digits;
}

}  // namespace gateloop::model
