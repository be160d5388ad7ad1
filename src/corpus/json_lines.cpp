#include "corpus/json_lines.h"

#include <algorithm>
#include <stdexcept>

#include "model/parse_json.h"

namespace gateloop::corpus {
namespace {

using nlohmann::json;

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

/// Null where there is none.
const json* find_field(const json& object, std::string_view name) {
  if (!object.is_object()) return nullptr;
  if (const auto found = object.find(std::string(name)); found != object.end()) return &*found;
  for (std::size_t dot = name.find('.'); dot != std::string_view::npos;
       dot = name.find('.', dot + 1)) {
    const auto outer = object.find(std::string(name.substr(0, dot)));
    if (outer == object.end()) continue;
    if (const json* const inner = find_field(*outer, name.substr(dot + 1))) return inner;
  }
  return nullptr;
}

/// "text", "meta": at most 200 bytes of them, and safe to print.
std::string names_of(const json& object) {
  constexpr std::size_t kShown = 200;
  std::string names;
  for (const auto& [name, member] : object.items()) {
    const std::string quoted = json(name).dump(-1, ' ', /*ensure_ascii=*/true);
    if (names.size() + quoted.size() > kShown) return names + ", ...";
    names += (names.empty() ? "" : ", ") + quoted;
  }
  return names;
}

const std::string& text_of(const json& line, const std::string& field) {
  if (!line.is_object()) {
    throw std::runtime_error("a JSON object was expected, got " + std::string(line.type_name()));
  }
  const json* const value = find_field(line, field);
  if (value == nullptr) {
    throw std::runtime_error("there is no field \"" + field + "\" among " + names_of(line));
  }
  if (value->is_string()) return value->get_ref<const std::string&>();
  throw std::runtime_error("field \"" + field + "\" must be a string, got " +
                           std::string(value->type_name()));
}

/// Without what was read last, which can be the whole line, and the parser's own count of lines.
std::string reason_of(const json::parse_error& error) {
  const std::string text = error.what();
  const std::size_t end = text.find("; last read");
  const std::size_t dash = text.find(" - ");
  const std::size_t begin = dash < end ? dash + 3 : text.find("] ") + 2;
  return text.substr(begin, end == std::string::npos ? end : end - begin);
}

}  // namespace

bool is_named_json_lines(const std::filesystem::path& path) {
  const std::string name = path.filename().string() + ".";
  return name.find(".jsonl.") != std::string::npos || name.find(".ndjson.") != std::string::npos;
}

void read_json_lines(std::span<const std::uint8_t> bytes, const std::string& field,
                     const std::function<void(std::string_view text)>& take) {
  std::string_view rest(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  for (std::int64_t number = 1; !rest.empty(); ++number) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    if (is_blank(line)) continue;
    try {
      take(text_of(model::parse_json<json>(std::string(line)), field));
    } catch (const json::parse_error& error) {
      throw std::runtime_error("line " + std::to_string(number) + ": is no JSON: " +
                               reason_of(error) + " (byte " + std::to_string(error.byte) + ")");
    } catch (const json::exception& error) {  // a number beyond double's
      throw std::runtime_error("line " + std::to_string(number) + ": is no JSON: " + error.what());
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("line " + std::to_string(number) + ": " + error.what());
    }
  }
}

}  // namespace gateloop::corpus
