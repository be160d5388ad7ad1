#include "model/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace gateloop::model {
namespace {

// Linux transfers at most 0x7ffff000 bytes a call; a round number below it.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

[[noreturn]] void throw_system_error(const std::filesystem::path& path, const char* action,
                                     int error) {
  throw std::runtime_error(path.string() + ": cannot " + action + ": " +
                           std::generic_category().message(error));
}

std::filesystem::path folder_of(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

std::string hidden_name(const std::filesystem::path& path) {
  std::string name = ".";
  name += path.filename().string();
  return name += ".tmp";
}

/// The file, empty, which this process has alone: waits while another writes it.
int open_alone(const std::filesystem::path& path) {
  while (true) {
    FileDescriptor fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
    if (fd.get() < 0) return -1;
    while (::flock(fd.get(), LOCK_EX) != 0 && errno == EINTR) {
    }  // a file system without locks: as without other writers
    struct stat locked = {}, named = {};
    // Whoever had the lock has renamed or removed the file.
    const bool is_there = ::fstat(fd.get(), &locked) == 0 && ::stat(path.c_str(), &named) == 0 &&
                          locked.st_ino == named.st_ino && locked.st_dev == named.st_dev;
    if (is_there && ::ftruncate(fd.get(), 0) == 0) return fd.release();
    if (is_there) return -1;
  }
}

}  // namespace

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

AtomicFile::AtomicFile(std::filesystem::path path)
    : path_(std::move(path)),
      temporary_(folder_of(path_) / hidden_name(path_)),
      file_(open_alone(temporary_)) {
  if (file_.get() < 0) throw_system_error(temporary_, "create", errno);
}

AtomicFile::~AtomicFile() {
  if (!committed_) ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* action, int error) const {
  throw std::runtime_error(path_.string() + ": cannot " + action + ": " +
                           std::generic_category().message(error) +
                           (std::filesystem::exists(path_) ? "; the file there before is unchanged"
                                                           : "; no file was left behind"));
}

void AtomicFile::write(const void* data, std::size_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(file_.get(), next, std::min(bytes, kMaxTransfer));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail("write", errno);
    next += written;
    bytes -= static_cast<std::size_t>(written);
  }
}

void AtomicFile::commit() {
  if (::fsync(file_.get()) != 0) fail("flush to the disk", errno);
  const FileDescriptor lock(::dup(file_.get()));  // until it has its name
  // Network file systems report a full disk as late as here.
  if (::close(file_.release()) != 0) fail("close", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename into place", errno);
  committed_ = true;
  // The rename itself is durable once the folder is on the disk. Some file systems cannot sync a
  // folder (EINVAL); the content is whole either way.
  const FileDescriptor folder(::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() >= 0 && ::fsync(folder.get()) != 0 && errno != EINVAL) {
    throw_system_error(folder_of(path_), "flush the folder to the disk", errno);
  }
}

InputFile::InputFile(const std::filesystem::path& path)
    : path_(path), file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (file_.get() < 0) throw_system_error(path_, "open", errno);
  struct stat status {};
  if (::fstat(file_.get(), &status) != 0) throw_system_error(path_, "examine", errno);
  if (!S_ISREG(status.st_mode)) {
    throw std::runtime_error(path_.string() + ": not a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

void InputFile::read(void* data, std::size_t bytes, std::uint64_t offset) const {
  char* next = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got =
        ::pread(file_.get(), next, std::min(bytes, kMaxTransfer), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw_system_error(path_, "read", errno);
    if (got == 0)
      throw std::runtime_error(path_.string() + ": ends before byte " +
                               std::to_string(offset + bytes));
    next += got;
    bytes -= static_cast<std::size_t>(got);
    offset += static_cast<std::uint64_t>(got);
  }
}

std::string read_text(const std::filesystem::path& path) {
  const InputFile file(path);
  std::string text(file.size(), '\0');
  file.read(text.data(), text.size(), 0);
  return text;
}

void save_text(const std::filesystem::path& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace gateloop::model
