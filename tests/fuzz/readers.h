#pragma once

/// Readers of files that others may have written or broken, each on one file.
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace gateloop::fuzz {

struct Reader {
  const char* name;
  /// The file's name in a directory of its own.
  const char* file;
  /// Writes valid files of the kind into an empty directory.
  std::function<void(const std::filesystem::path& directory)> write_seeds;
  /// Reads DIRECTORY/file. An exception derived from std::exception is a good answer.
  std::function<void(const std::filesystem::path& directory)> read;
};

const std::vector<Reader>& readers();

/// Whether the reader takes a file of these bytes, which is written into the directory.
bool accepts(const Reader& reader, const std::filesystem::path& directory, std::string_view bytes);

}  // namespace gateloop::fuzz
