#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "checkpoint/file.h"
#include "gateloop/training.h"

namespace gateloop::training {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& problem) {
  throw std::runtime_error(path.string() + ": " + problem);
}

/// A whole file, mapped read-only.
class Mapping {
 public:
  explicit Mapping(const std::filesystem::path& path) {
    const checkpoint::FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0) fail(path, "cannot open: " + std::generic_category().message(errno));
    struct stat status {};
    if (::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) {
      fail(path, "not a regular file");
    }
    size_ = static_cast<std::size_t>(status.st_size);
    if (size_ == 0) fail(path, "the file is empty");
    data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (data_ == MAP_FAILED) fail(path, "cannot map: " + std::generic_category().message(errno));
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(data_, size_); }

  std::span<const std::uint8_t> bytes() const {
    return {static_cast<const std::uint8_t*>(data_), size_};
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

bool is_gzip(std::span<const std::uint8_t> bytes) {
  return bytes.size() >= 2 && bytes[0] == 0x1f && bytes[1] == 0x8b;
}

/// All members of a gzip file, one after the other, checksums verified.
std::vector<std::uint8_t> gunzip(const std::filesystem::path& path) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(::gzopen(path.c_str(), "rb"), ::gzclose_r);
  if (!file) fail(path, "cannot open: " + std::generic_category().message(errno));
  ::gzbuffer(file.get(), 1 << 18);
  std::vector<std::uint8_t> bytes;
  constexpr std::size_t kChunk = 1 << 22;
  while (true) {
    const std::size_t used = bytes.size();
    bytes.resize(used + kChunk);
    const int got = ::gzread(file.get(), bytes.data() + used, kChunk);
    int error = Z_OK;
    const std::string message = ::gzerror(file.get(), &error);
    if (got < 0 || (error != Z_OK && error != Z_STREAM_END)) {
      fail(path, error == Z_BUF_ERROR ? "the gzip file is truncated"
                                      : "the gzip file is damaged: " + message);
    }
    bytes.resize(used + static_cast<std::size_t>(got));
    if (got == 0) return bytes;
  }
}

/// 12345678 -> "12,345,678"
std::string grouped(std::int64_t number) {
  const std::string digits = std::to_string(number);
  std::string text;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

Split default_split(std::int64_t size) {
  const std::int64_t part = size / 20;  // 5 per cent; of enwik8, 5,000,000
  return {.train = size - 2 * part, .valid = part, .test = part};
}

void check_split(const std::filesystem::path& path, const Split& split, std::int64_t size) {
  if (split.train < 0 || split.valid < 0 || split.test < 0) {
    fail(path, "a split cannot be negative");
  }
  // Compared one by one: the sum of three large numbers could overflow.
  if (split.train > size || split.valid > size - split.train ||
      split.test > size - split.train - split.valid) {
    fail(path, "the split " + grouped(split.train) + " + " + grouped(split.valid) + " + " +
                   grouped(split.test) + " is larger than the file, which holds " + grouped(size) +
                   " bytes");
  }
}

}  // namespace

struct Corpus::Storage {
  std::unique_ptr<Mapping> mapping;        // plain
  std::vector<std::uint8_t> decompressed;  // gzip
};

Corpus::Corpus(const std::filesystem::path& path, std::optional<Split> split)
    : path_(path), storage_(std::make_unique<Storage>()) {
  storage_->mapping = std::make_unique<Mapping>(path);
  bytes_ = storage_->mapping->bytes();
  if (is_gzip(bytes_)) {
    storage_->mapping.reset();
    storage_->decompressed = gunzip(path);
    bytes_ = storage_->decompressed;
    if (bytes_.empty()) fail(path, "the gzip file holds nothing");
  }
  const auto size = static_cast<std::int64_t>(bytes_.size());
  split_ = split.value_or(default_split(size));
  check_split(path, split_, size);
}

Corpus::~Corpus() = default;
Corpus::Corpus(Corpus&&) noexcept = default;
Corpus& Corpus::operator=(Corpus&&) noexcept = default;

std::span<const std::uint8_t> Corpus::train() const {
  return bytes_.first(static_cast<std::size_t>(split_.train));
}
std::span<const std::uint8_t> Corpus::valid() const {
  return bytes_.subspan(static_cast<std::size_t>(split_.train),
                        static_cast<std::size_t>(split_.valid));
}
std::span<const std::uint8_t> Corpus::test() const {
  return bytes_.subspan(static_cast<std::size_t>(split_.train + split_.valid),
                        static_cast<std::size_t>(split_.test));
}

std::string Corpus::fingerprint() const {
  constexpr std::size_t kBlocks = 64;
  constexpr std::size_t kBlockBytes = 1 << 16;
  uLong crc = ::crc32(0, nullptr, 0);
  const std::size_t stride = std::max(bytes_.size() / kBlocks, kBlockBytes);
  for (std::size_t begin = 0; begin < bytes_.size(); begin += stride) {
    const std::size_t bytes = std::min(kBlockBytes, bytes_.size() - begin);
    crc = ::crc32(crc, bytes_.data() + begin, static_cast<uInt>(bytes));
  }
  char text[48];
  std::snprintf(text, sizeof text, "%zu bytes, crc %08lx", bytes_.size(), crc);
  return text;
}

std::string Corpus::description() const {
  std::string text = path_.string() + ": " + grouped(std::ssize(bytes_)) + " bytes (" +
                     grouped(split_.train) + " train, " + grouped(split_.valid) + " valid, " +
                     grouped(split_.test) + " test";
  const std::int64_t unused = std::ssize(bytes_) - split_.train - split_.valid - split_.test;
  if (unused > 0) text += ", " + grouped(unused) + " unused";
  return text + ")";
}

}  // namespace gateloop::training
