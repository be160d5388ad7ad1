#pragma once

#include <charconv>
#include <string>

namespace gateloop::model {

/// The shortest text that reads back to the same number, in every locale.
template <typename Number>
std::string number_text(Number number) {
  char buffer[32];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, number).ptr};
}

}  // namespace gateloop::model
