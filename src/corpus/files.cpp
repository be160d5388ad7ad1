#include "corpus/files.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace gateloop::corpus {
namespace {

namespace fs = std::filesystem;

/// The files of one folder given.
class Folder {
 public:
  explicit Folder(std::vector<SourceFile>& files) : files_(files) {}

  void add(const fs::path& folder) {
    around_.push_back(folder);
    for (const fs::directory_entry& entry : entries_of(folder)) {
      const fs::file_status status = status_of(entry);
      if (fs::is_regular_file(status)) files_.push_back({entry.path(), true});
      if (!fs::is_directory(status)) continue;
      // Without a link no folder holds itself.
      if (entry.is_symlink()) check_no_loop(entry.path());
      add(entry.path());
    }
    around_.pop_back();
  }

 private:
  static std::vector<fs::directory_entry> entries_of(const fs::path& folder) {
    std::vector<fs::directory_entry> entries;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      if (!entry.path().filename().native().starts_with('.')) entries.push_back(entry);
    }
    std::sort(entries.begin(), entries.end());
    return entries;
  }

  static fs::file_status status_of(const fs::directory_entry& entry) {
    const fs::file_status status = entry.status();
    if (fs::exists(status)) return status;
    throw std::runtime_error(entry.path().string() + ": is a link to nothing, or gone");
  }

  void check_no_loop(const fs::path& link) const {
    for (const fs::path& folder : around_) {
      if (!fs::equivalent(folder, link)) continue;
      throw std::runtime_error(link.string() + ": is a link back to " + folder.string() +
                               ", in which it lies");
    }
  }

  std::vector<SourceFile>& files_;
  std::vector<fs::path> around_;
};

}  // namespace

std::vector<SourceFile> files_of(const std::vector<fs::path>& paths) {
  std::vector<SourceFile> files;
  for (const fs::path& path : paths) {
    try {
      if (fs::is_directory(path)) {
        Folder(files).add(path);
      } else {
        files.push_back({path, false});
      }
    } catch (const fs::filesystem_error& error) {
      throw std::runtime_error(error.path1().string() + ": " + error.code().message());
    }
  }
  return files;
}

}  // namespace gateloop::corpus
