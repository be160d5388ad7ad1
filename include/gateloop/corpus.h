#pragma once

/// Texts: the bytes of a file, packed or not, and their parts.
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace gateloop::corpus {

/// Bytes of the three parts of a corpus, which follow one another from its first byte.
struct Split {
  std::int64_t train = 0;
  std::int64_t valid = 0;
  std::int64_t test = 0;
  bool operator==(const Split&) const = default;
};

/// The bytes of a file, read into memory. What its first bytes say to be packed is unpacked: gzip,
/// bzip2, xz, zstd, lz4, lzip, compress; zip, tar, 7z and rar that hold exactly one file.
class Corpus {
 public:
  /// Default split: 90/5/5 per cent. Throws std::runtime_error naming the path and what is wrong
  /// (missing, empty, truncated, damaged, encrypted, several files, a split longer than the file).
  explicit Corpus(const std::filesystem::path& path, std::optional<Split> split = std::nullopt);

  const std::filesystem::path& path() const { return path_; }
  const Split& split() const { return split_; }
  std::span<const std::uint8_t> bytes() const { return bytes_; }
  std::span<const std::uint8_t> train() const { return part(0, split_.train); }
  std::span<const std::uint8_t> valid() const { return part(split_.train, split_.valid); }
  std::span<const std::uint8_t> test() const {
    return part(split_.train + split_.valid, split_.test);
  }

  /// Size and a CRC-32 of samples all over the unpacked bytes: tells another corpus, at the cost of
  /// reading at most 4 MiB.
  std::string fingerprint() const;
  /// "data/enwik8: 100,000,000 bytes: 90,000,000 to train, 5,000,000 to validate, ..."
  std::string description() const;

 private:
  std::span<const std::uint8_t> part(std::int64_t begin, std::int64_t bytes) const {
    return this->bytes().subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(bytes));
  }

  std::filesystem::path path_;
  std::vector<std::uint8_t> bytes_;
  Split split_;
};

}  // namespace gateloop::corpus
