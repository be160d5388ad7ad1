#pragma once

/// Structs of options as JSON objects, one member per field. A struct names its fields once, in
/// GATELOOP_JSON_FIELDS or in a function template `for_each_field(options, visit)` that calls
/// visit(name, field) for each; encode_fields and decode_fields do the rest.
#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/model.h"

/// Defines for_each_field() of a struct whose fields have the names that JSON has.
#define GATELOOP_JSON_FIELDS(Type, ...)                                         \
  template <typename Options, typename Visitor>                                 \
  requires std::is_same_v<std::remove_const_t<Options>, Type>                   \
  void for_each_field(Options& options, Visitor&& visit) {                      \
    NLOHMANN_JSON_EXPAND(NLOHMANN_JSON_PASTE(GATELOOP_JSON_FIELD, __VA_ARGS__)) \
  }
#define GATELOOP_JSON_FIELD(field) visit(#field, options.field);

namespace gateloop::model::json_fields {

using json = nlohmann::ordered_json;  // config.json keeps the order of the struct

/// "format" in config.json.
inline constexpr int kConfigFormat = 1;

inline json encode(std::int64_t value) { return value; }
inline json encode(std::uint64_t value) { return value; }
inline json encode(bool value) { return value; }
inline json encode(double value) { return value; }
inline json encode(const std::string& value) { return value; }
template <typename Enum>
requires std::is_enum_v<Enum> json encode(Enum value) { return std::string(name_of(value)); }
/// Booleans where version 0.1 has them.
inline json encode(NormalizeInput value) {
  if (value == NormalizeInput::kVariance) return std::string(name_of(value));
  return value == NormalizeInput::kMean;
}
inline json encode(const std::pair<double, double>& value) {
  return json::array({value.first, value.second});
}
/// Of one the string itself.
inline json encode(const std::vector<std::string>& values) {
  return values.size() == 1 ? json(values.front()) : json(values);
}
template <typename T>
json encode(const std::optional<T>& value) {
  return value ? encode(*value) : json(nullptr);
}

[[noreturn]] inline void wrong_type(const std::string& name, const char* expected,
                                    const json& value) {
  throw std::runtime_error("option \"" + name + "\" must be " + expected + ", not " + value.dump());
}

inline void decode(const std::string& name, const json& value, std::int64_t& field) {
  const bool fits = value.is_number_integer() &&
                    !(value.is_number_unsigned() && value.get<std::uint64_t>() >> 63 != 0);
  if (!fits) wrong_type(name, "an integer of 64 bits", value);
  field = value.get<std::int64_t>();
}
inline void decode(const std::string& name, const json& value, std::uint64_t& field) {
  if (!value.is_number_unsigned()) wrong_type(name, "a non-negative integer", value);
  field = value.get<std::uint64_t>();
}
inline void decode(const std::string& name, const json& value, bool& field) {
  if (!value.is_boolean()) wrong_type(name, "true or false", value);
  field = value.get<bool>();
}
inline void decode(const std::string& name, const json& value, double& field) {
  if (!value.is_number()) wrong_type(name, "a number", value);
  field = value.get<double>();
}
inline void decode(const std::string& name, const json& value, std::string& field) {
  if (!value.is_string()) wrong_type(name, "a string", value);
  field = value.get<std::string>();
}
inline void decode(const std::string& name, const json& value, std::vector<std::string>& field) {
  const json values = value.is_string() ? json::array({value}) : value;
  const auto is_string = [](const json& item) { return item.is_string(); };
  if (!values.is_array() || !std::all_of(values.begin(), values.end(), is_string)) {
    wrong_type(name, "a string or a list of strings", value);
  }
  field = values.get<std::vector<std::string>>();
}
template <typename Enum>
requires std::is_enum_v<Enum>
void decode(const std::string& name, const json& value, Enum& field) {
  std::string known;
  for (const auto& [text, named] : names_of(Enum())) {
    if (value == text) {
      field = named;
      return;
    }
    known.append(known.empty() ? "\"" : ", \"").append(text).append("\"");
  }
  wrong_type(name, ("one of " + known).c_str(), value);
}
inline void decode(const std::string& name, const json& value, NormalizeInput& field) {
  if (value.is_boolean()) {
    field = value.get<bool>() ? NormalizeInput::kMean : NormalizeInput::kNone;
  } else {
    decode<NormalizeInput>(name, value, field);
  }
}
inline void decode(const std::string& name, const json& value, std::pair<double, double>& field) {
  if (!value.is_array() || value.size() != 2 || !value[0].is_number() || !value[1].is_number()) {
    wrong_type(name, "a pair of numbers [low, high]", value);
  }
  field = {value[0].get<double>(), value[1].get<double>()};
}
template <typename T>
void decode(const std::string& name, const json& value, std::optional<T>& field) {
  if (value.is_null()) {
    field.reset();
  } else {
    decode(name, value, field.emplace());
  }
}

/// `options` as an object, in the order of its fields.
template <typename Options>
json encode_fields(const Options& options) {
  json object = json::object();
  for_each_field(options,
                 [&](const char* name, const auto& field) { object[name] = encode(field); });
  return object;
}

/// A field that is absent keeps its value: a later version may add options. What is no field stays
/// in `object`.
template <typename Options>
void take_fields(json& object, Options& options) {
  if (!object.is_object()) throw std::runtime_error("not a JSON object: " + object.dump());
  for_each_field(options, [&](const char* name, auto& field) {
    const auto found = object.find(name);
    if (found == object.end()) return;
    decode(name, *found, field);
    object.erase(found);
  });
}

/// Throws where anything is left that nothing took.
inline void expect_empty(const json& object) {
  if (!object.empty()) {
    throw std::runtime_error("unknown option \"" + object.begin().key() + "\"");
  }
}

/// The same for an object of these fields alone: an unknown one is an error.
template <typename Options>
void decode_fields(json object, Options& options) {
  take_fields(object, options);
  expect_empty(object);
}

}  // namespace gateloop::model::json_fields
