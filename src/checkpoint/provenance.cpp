#include <torch/version.h>

#include <ctime>
#include <fstream>
#include <iterator>

#include "gateloop/checkpoint.h"
#include "model/config_file.h"

namespace gateloop::checkpoint {

// Written by cmake/revision.cmake; the revision is git's.
extern const char* const kVersion;
extern const char* const kRevision;

namespace {

using model::json_fields::json;

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

std::string provenance(int processes) {
  json object = {{"program", std::string("gateloop ") + kVersion},
                 {"revision", kRevision},
                 {"torch", TORCH_VERSION},
                 {"processor", processor_name()},
                 {"command", command_line()},
                 {"date", date()}};
  if (processes > 1) object["processes"] = processes;
  // Arguments are bytes; in JSON those that are not UTF-8 become U+FFFD.
  return object.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
}

std::vector<std::string> load_provenance(const std::filesystem::path& dir) {
  return model::provenance_of(model::read_config(dir, {}));
}

}  // namespace gateloop::checkpoint
