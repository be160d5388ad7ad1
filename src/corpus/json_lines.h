#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace gateloop::corpus {

/// Whether a file's name is that of JSON lines, packed or not: .jsonl or .ndjson is among its
/// extensions.
bool is_named_json_lines(const std::filesystem::path& path);

/// Calls `take` with the text of each line: `bytes` hold one JSON object a line, whose member
/// `field` is a string. "a.b" is the member "a.b" or, where there is none, "b" of the member "a".
/// Blank lines are skipped. Throws std::runtime_error naming the line, counted from 1.
void read_json_lines(std::span<const std::uint8_t> bytes, const std::string& field,
                     const std::function<void(std::string_view text)>& take);

}  // namespace gateloop::corpus
