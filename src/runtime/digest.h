#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace gateloop::runtime {

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

}  // namespace gateloop::runtime
