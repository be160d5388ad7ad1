#include "gateloop/corpus.h"

#include <zlib.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "corpus/files.h"
#include "corpus/json_lines.h"
#include "corpus/unpack.h"
#include "model/file.h"
#include "model/number_text.h"

namespace gateloop::corpus {
namespace {

using model::grouped;
using Text = std::span<const std::uint8_t>;
using Paths = std::vector<std::filesystem::path>;

[[noreturn]] void fail(const std::string& name, const std::string& problem) {
  throw std::runtime_error(name + ": " + problem);
}

std::string size_and_crc(std::size_t bytes, uLong crc) {
  char text[48];
  std::snprintf(text, sizeof text, "%zu bytes, crc %08lx", bytes, crc);
  return text;
}

Split default_split(std::int64_t size) {
  const std::int64_t part = size / 20;  // 5 per cent; of enwik8, 5,000,000
  return {.train = size - 2 * part, .valid = part, .test = part};
}

void check_split(const std::string& name, const Split& split, std::int64_t size) {
  if (split.train < 0 || split.valid < 0 || split.test < 0) {
    fail(name, "a split cannot be negative");
  }
  // Compared one by one: the sum of three large numbers could overflow.
  if (split.train > size || split.valid > size - split.train ||
      split.test > size - split.train - split.valid) {
    fail(name, "the split " + grouped(split.train) + " + " + grouped(split.valid) + " + " +
                   grouped(split.test) + " is larger than the text, which holds " + grouped(size) +
                   " bytes");
  }
}

constexpr std::size_t kHead = 8192;

/// Git's test.
bool is_text(Text bytes) {
  const auto start = bytes.first(std::min(bytes.size(), kHead));
  return std::find(start.begin(), start.end(), 0) == start.end();
}

/// By the marks at both ends.
bool is_parquet(Text bytes) {
  constexpr std::string_view kMark = "PAR1";
  const auto equals = [&](Text part) {
    return std::equal(part.begin(), part.end(), kMark.begin());
  };
  return bytes.size() >= 2 * kMark.size() && equals(bytes.first(kMark.size())) &&
         equals(bytes.last(kMark.size()));
}

/// The first `shown` of the paths, or all where they are no more than one longer.
std::string listed(const Paths& paths, std::size_t shown) {
  if (paths.size() <= shown + 1) shown = paths.size();
  std::string text;
  for (std::size_t i = 0; i < shown; ++i) text += (i == 0 ? "" : ", ") + paths[i].string();
  const std::size_t more = paths.size() - shown;
  return more == 0 ? text : text + " and " + grouped(static_cast<std::int64_t>(more)) + " more";
}

/// With `text_only` nothing of a file that begins neither as text nor packed: a large one is not
/// read whole. Not mapped: a mapped file that another process cuts short is a SIGBUS, here an error
/// of read().
std::optional<std::vector<std::uint8_t>> read_unpacked(const std::filesystem::path& path,
                                                       bool text_only) {
  const model::InputFile file(path);
  std::vector<std::uint8_t> bytes(std::min<std::uint64_t>(file.size(), kHead));
  const std::size_t head = bytes.size();
  file.read(bytes.data(), head, 0);
  if (text_only && !is_text(bytes) && !is_packed(bytes)) return std::nullopt;
  bytes.resize(file.size());
  file.read(bytes.data() + head, bytes.size() - head, head);
  try {
    return unpacked(std::move(bytes));
  } catch (const Unread& error) {
    throw Unread(path.string() + ": " + error.what());
  } catch (const std::runtime_error& error) {
    fail(path.string(), error.what());
  }
}

}  // namespace

Corpus::Corpus(Sources sources, std::optional<Split> split) : sources_(std::move(sources)) {
  for (const auto& [path, found] : files_of(sources_.paths)) read(path, found);
  if (bytes_.empty()) {
    fail(name(),
         "holds no text" +
             (left_out_.empty() ? "" : "; left out: " + left_out() + ": name a file to read it"));
  }
  const auto size = std::ssize(bytes_);
  split_ = split.value_or(default_split(size));
  check_split(name(), split_, size);
}

/// `found`: in a folder, not given itself.
void Corpus::read(const std::filesystem::path& path, bool found) {
  const bool lines = !sources_.field.empty();
  if (found && lines && !is_named_json_lines(path)) return left_out_.push_back(path);
  std::optional<std::vector<std::uint8_t>> content;
  try {
    content = read_unpacked(path, found && !lines);
  } catch (const Unread&) {
    if (!found) throw;
  }
  if (!content) return left_out_.push_back(path);
  std::vector<std::uint8_t> bytes = std::move(*content);
  if (bytes.empty() && found) return;
  if (bytes.empty()) {
    const bool empty = std::filesystem::file_size(path) == 0;
    fail(path.string(), empty ? "the file is empty" : "holds no bytes");
  }
  if (found && !lines && !is_text(bytes)) return left_out_.push_back(path);
  if (is_parquet(bytes)) {
    fail(path.string(),
         "is a parquet file, which is not read: write JSON lines of it, as docs/data.md shows");
  }
  ++files_;
  try {
    if (lines) {
      append_lines(bytes);
    } else if (sources_.documents) {
      append_document(bytes);
    } else if (bytes_.empty()) {
      bytes_ = std::move(bytes);
    } else {
      bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    }
  } catch (const std::runtime_error& error) {
    fail(path.string(), error.what());
  }
}

void Corpus::append_lines(std::span<const std::uint8_t> lines) {
  read_json_lines(lines, sources_.field, [this](std::string_view text) {
    if (sources_.documents) {
      append_document({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
    } else {
      bytes_.insert(bytes_.end(), text.begin(), text.end());
      bytes_.push_back('\n');
    }
  });
}

void Corpus::append_document(std::span<const std::uint8_t> text) {
  if (text.empty()) return;
  const auto found = std::find(text.begin(), text.end(), kSeparator);
  if (found != text.end()) {
    throw std::runtime_error("byte " + grouped(found - text.begin()) +
                             " is 0xFF, which separates documents: they must not hold it, as "
                             "UTF-8 does not");
  }
  if (documents_++ == 0) bytes_.push_back(kSeparator);
  bytes_.insert(bytes_.end(), text.begin(), text.end());
  bytes_.push_back(kSeparator);
}

std::optional<std::uint8_t> Corpus::separator() const {
  return sources_.documents ? std::optional(kSeparator) : std::nullopt;
}

std::string Sources::name() const { return listed(paths, 2); }

std::string Corpus::left_out() const {
  if (left_out_.empty()) return "";
  const std::string count = left_out_.size() == 1
                                ? "1 file that is no "
                                : grouped(std::ssize(left_out_)) + " files that are no ";
  const char* kind = sources_.field.empty() ? "text" : "JSON lines (.jsonl, .ndjson)";
  return count + kind + ": " + listed(left_out_, 4);
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
  return size_and_crc(bytes_.size(), crc);
}

std::string Corpus::checksum() const {
  return size_and_crc(bytes_.size(), ::crc32_z(0, bytes_.data(), bytes_.size()));
}

std::string Corpus::description() const {
  const std::string files = files_ == 1 ? "" : grouped(files_) + " files, ";
  const std::string documents = documents_ == 0 ? "" : grouped(documents_) + " documents, ";
  std::string text = name() + ": " + files + documents + grouped(std::ssize(bytes_)) + " bytes (" +
                     grouped(split_.train) + " train, " + grouped(split_.valid) + " valid, " +
                     grouped(split_.test) + " test";
  const std::int64_t unused = std::ssize(bytes_) - split_.train - split_.valid - split_.test;
  if (unused > 0) text += ", " + grouped(unused) + " unused";
  return text + ")";
}

}  // namespace gateloop::corpus
