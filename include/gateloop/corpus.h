#pragma once

/// Texts: the bytes of files, packed or not, and their parts.
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

/// Where a corpus comes from.
struct Sources {
  /// Files and folders, read in this order. A path given twice is read twice.
  std::vector<std::filesystem::path> paths;
  /// Not empty: files are JSON lines, and each line's text is this member of its object, a string.
  /// "a.b" is "b" of the member "a", where there is no member "a.b". The texts are read one after
  /// another, a newline after each.
  std::string field = {};
  /// Every file, or every line of JSON, is a document: kSeparator stands before the first, between
  /// them and after the last, in place of the newlines of JSON lines. Empty ones are left out.
  bool documents = false;

  /// The paths, all of three or the first two: "a, b and 28 more".
  std::string name() const;
};

/// Begins a document, and ends the one before. No byte of UTF-8; documents must not hold it.
inline constexpr std::uint8_t kSeparator = 0xFF;

/// The bytes of files, one after another, read into memory. A file is unpacked where its first
/// bytes are those of a packed form: gzip, bzip2, xz, zstd, lz4, lzip, compress; zip, tar, 7z and
/// rar that hold exactly one file.
///
/// Of a folder all files are read, those of its folders too, by name in byte order. Left out are
/// names that begin with a dot, empty files, and files that are no text: with a zero among the
/// first 8192 unpacked bytes; or, with a field, whose names do not end as in .jsonl or .ndjson,
/// perhaps packed. A file that is given itself is read whatever its name. Links are followed.
class Corpus {
 public:
  /// Default split: 90/5/5 per cent of all bytes. Throws std::runtime_error naming the path and
  /// what is wrong. A file: missing, empty, truncated, damaged, encrypted, parquet, or an archive
  /// of several files. A folder: without text, or a link back to a folder around it. A text:
  /// shorter than the split, a line that is no JSON or without the field, a document that holds
  /// kSeparator.
  explicit Corpus(Sources sources, std::optional<Split> split = std::nullopt);
  explicit Corpus(const std::filesystem::path& path, std::optional<Split> split = std::nullopt)
      : Corpus(Sources{.paths = {path}}, split) {}

  const Sources& sources() const { return sources_; }
  std::string name() const { return sources_.name(); }
  const Split& split() const { return split_; }
  std::span<const std::uint8_t> bytes() const { return bytes_; }
  std::span<const std::uint8_t> train() const { return part(0, split_.train); }
  std::span<const std::uint8_t> valid() const { return part(split_.train, split_.valid); }
  std::span<const std::uint8_t> test() const {
    return part(split_.train + split_.valid, split_.test);
  }

  /// Size and a CRC-32 of samples all over the unpacked bytes: differs for another corpus, at the
  /// cost of reading at most 4 MiB.
  std::string fingerprint() const;
  /// The same of all bytes.
  std::string checksum() const;
  /// The first byte of each document, at which a state starts anew; nothing without documents.
  std::optional<std::uint8_t> separator() const;
  /// "texts: 30 files, 123,456 bytes (111,112 train, 6,172 valid, 6,172 test)"
  std::string description() const;
  /// "2 files that are no text: texts/a.png, texts/b.pdf"; empty where nothing was left out.
  std::string left_out() const;

 private:
  std::span<const std::uint8_t> part(std::int64_t begin, std::int64_t bytes) const {
    return this->bytes().subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(bytes));
  }

  void read(const std::filesystem::path& path, bool found);
  void append_lines(std::span<const std::uint8_t> lines);
  void append_document(std::span<const std::uint8_t> text);

  Sources sources_;
  std::vector<std::filesystem::path> left_out_;
  std::int64_t files_ = 0;      // read
  std::int64_t documents_ = 0;  // in them
  std::vector<std::uint8_t> bytes_;
  Split split_;
};

}  // namespace gateloop::corpus
