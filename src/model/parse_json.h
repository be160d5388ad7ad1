#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace gateloop::model {

/// Far above what our files nest. nlohmann-json prints values by recursion: 50,000 levels fit a
/// stack of 8 MiB, 100,000 overflow it.
inline constexpr int kMaxJsonDepth = 64;

/// `text` as JSON; invalid or deeply nested text is an exception.
template <typename Json>
Json parse_json(const std::string& text) {
  return Json::parse(text, [](int depth, typename Json::parse_event_t, Json&) {
    if (depth < kMaxJsonDepth) return true;
    throw std::runtime_error("JSON nested " + std::to_string(kMaxJsonDepth) + " levels or deeper");
  });
}

/// Whether it can be a string of JSON.
inline bool is_utf8(const std::string& text) {
  using nlohmann::json;
  const auto written =
      json(text).dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
  return json::parse(written) == text;
}

}  // namespace gateloop::model
