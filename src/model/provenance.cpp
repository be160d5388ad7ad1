#include "model/provenance.h"

#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

namespace gateloop::model {
namespace {

using json = nlohmann::ordered_json;

/// "model name" of the first processor; empty where the system does not say.
std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(": ") + 2);
  }
  return "";
}

/// The arguments of this process, the program first.
json command_line() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  json words = json::array();
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  return words;
}

std::string date() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  char text[32];
  return {text, std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc)};
}

}  // namespace

std::string provenance(const std::vector<std::pair<std::string, std::string>>& versions) {
  json object = {{"program", std::string("gateloop ") + kVersion}, {"revision", kRevision}};
  for (const auto& [library, version] : versions) object[library] = version;
  object["processor"] = processor_name();
  object["command"] = command_line();
  object["date"] = date();
  // Arguments are bytes; in JSON those that are not UTF-8 become U+FFFD.
  return object.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

}  // namespace gateloop::model
