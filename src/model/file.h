#pragma once

/// Files whose every call is checked. Errors are std::runtime_error with the path, what was being
/// done and the system's reason.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace gateloop::model {

/// Owns a file descriptor.
class FileDescriptor {
 public:
  explicit FileDescriptor(int fd = -1) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  int get() const { return fd_; }
  int release() {
    const int fd = fd_;
    fd_ = -1;
    return fd;
  }

 private:
  int fd_;
};

/// A file being replaced. What is written goes to `.NAME.tmp` beside it; commit() flushes that to
/// the disk and renames it over `path`. Destroyed without commit(), it removes the temporary file,
/// and `path` is as it was. A process killed in between leaves only the temporary file, which the
/// next save truncates. Of two that write one file at a time the second waits for the first.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(const void* data, std::size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void commit();

 private:
  [[noreturn]] void fail(const char* action, int error) const;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  FileDescriptor file_;
  bool committed_ = false;
};

/// A file opened for reading at given offsets.
class InputFile {
 public:
  explicit InputFile(const std::filesystem::path& path);

  std::uint64_t size() const { return size_; }
  /// Reads exactly `bytes` from `offset`, or throws.
  void read(void* data, std::size_t bytes, std::uint64_t offset) const;

 private:
  std::filesystem::path path_;
  FileDescriptor file_;
  std::uint64_t size_ = 0;
};

std::string read_text(const std::filesystem::path& path);
/// Writes `text` to `path` by way of an AtomicFile.
void save_text(const std::filesystem::path& path, const std::string& text);

}  // namespace gateloop::model
