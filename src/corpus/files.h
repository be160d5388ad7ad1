#pragma once

#include <filesystem>
#include <vector>

namespace gateloop::corpus {

struct SourceFile {
  std::filesystem::path path;
  bool found = false;  ///< in a folder, not given itself
};

/// The paths that are files. In place of each folder the regular files in it and in its folders, by
/// name in byte order; names that begin with a dot are left out. Links are followed. Throws
/// std::runtime_error naming the path of a folder that cannot be read. Also of a link to nothing,
/// and of a link back to a folder around it.
std::vector<SourceFile> files_of(const std::vector<std::filesystem::path>& paths);

}  // namespace gateloop::corpus
