#pragma once

#include <charconv>
#include <cstdint>
#include <string>

namespace gateloop::model {

/// The shortest text that reads back to the same number, in every locale.
template <typename Number>
std::string number_text(Number number) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, number).ptr};
}

/// 12345678 -> "12,345,678"
inline std::string grouped(std::int64_t number) {
  std::string text = std::to_string(number);
  for (auto at = std::ssize(text) - 3; at > 0; at -= 3) text.insert(at, 1, ',');
  return text;
}

}  // namespace gateloop::model
