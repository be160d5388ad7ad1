#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace gateloop::test {

/// Text with structure to learn and no period: words drawn by a small generator.
inline std::string small_text(std::size_t bytes) {
  const char* words[] = {"the ", "gate ", "loops ", "over ", "time ", "and ", "forgets.\n"};
  std::string text;
  std::uint32_t state = 1;
  while (text.size() < bytes) {
    state = state * 1664525 + 1013904223;
    text += words[(state >> 16) % 7];
  }
  text.resize(bytes);
  return text;
}

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_bytes(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// metrics.jsonl without what a clock put into it: equal runs have equal lines, to the last bit.
inline std::vector<std::string> losses_of(const std::filesystem::path& dir) {
  std::ifstream file(dir / "metrics.jsonl");
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    nlohmann::json object = nlohmann::json::parse(line);
    object.erase("tokens_per_second");
    object.erase("elapsed_seconds");
    lines.push_back(object.dump());
  }
  return lines;
}

}  // namespace gateloop::test
