#include "corpus/unpack.h"

#include <archive.h>
#include <archive_entry.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace gateloop::corpus {
namespace {

using Bytes = std::vector<std::uint8_t>;
using View = std::span<const std::uint8_t>;

constexpr std::size_t kChunk = 1 << 22;

bool starts_with(View bytes, std::string_view magic) {
  return bytes.size() >= magic.size() &&
         std::equal(magic.begin(), magic.end(), bytes.begin(),
                    [](char a, std::uint8_t b) { return static_cast<std::uint8_t>(a) == b; });
}

bool all_zero(View bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::uint8_t byte) { return byte == 0; });
}

/// All members of a gzip file, one after the other, then only zeros. By zlib, because libarchive
/// checks no checksum of gzip.
Bytes gunzip(View packed) {
  z_stream stream{};
  if (::inflateInit2(&stream, MAX_WBITS + 16) != Z_OK) throw std::bad_alloc();
  const std::unique_ptr<z_stream, int (*)(z_streamp)> end(&stream, ::inflateEnd);
  Bytes bytes;
  while (true) {
    const View given = packed.first(std::min(packed.size(), kChunk));
    const std::size_t used = bytes.size();
    bytes.resize(used + kChunk);
    stream.next_in = const_cast<std::uint8_t*>(given.data());  // zlib only reads it
    stream.avail_in = static_cast<uInt>(given.size());
    stream.next_out = bytes.data() + used;
    stream.avail_out = kChunk;
    const int code = ::inflate(&stream, Z_NO_FLUSH);
    packed = packed.subspan(given.size() - stream.avail_in);
    bytes.erase(bytes.end() - static_cast<std::ptrdiff_t>(stream.avail_out), bytes.end());
    if (code == Z_STREAM_END) {
      if (all_zero(packed)) return bytes;
      ::inflateReset(&stream);
    } else if (code == Z_BUF_ERROR) {
      throw std::runtime_error("the gzip file is truncated");
    } else if (code != Z_OK) {
      throw std::runtime_error("the gzip file is damaged: " +
                               std::string(stream.msg != nullptr ? stream.msg : "no reason given"));
    }
  }
}

using Support = int (*)(archive*);

/// libarchive on bytes in memory.
class Reader {
 public:
  Reader(View packed, std::initializer_list<Support> kinds) : packed_(packed) {
    for (const Support support : kinds) support(archive_.get());
    if (archive_read_open_memory(archive_.get(), packed.data(), packed.size()) != ARCHIVE_OK) {
      fail();
    }
  }

  /// The next entry, or null after the last. A compressed file has one.
  archive_entry* next() {
    archive_entry* entry = nullptr;
    const int code = archive_read_next_header(archive_.get(), &entry);
    if (code == ARCHIVE_EOF) return nullptr;
    if (code != ARCHIVE_OK && code != ARCHIVE_WARN) fail();
    return entry;
  }

  /// Neither an archive nor compressed; known after the first next().
  bool plain() const {
    return archive_format(archive_.get()) == ARCHIVE_FORMAT_RAW &&
           archive_filter_count(archive_.get()) == 1;
  }

  Bytes content() {
    Bytes bytes;
    while (true) {
      const std::size_t used = bytes.size();
      bytes.resize(used + kChunk);
      const la_ssize_t got = archive_read_data(archive_.get(), bytes.data() + used, kChunk);
      if (got < 0) fail();
      bytes.resize(used + static_cast<std::size_t>(got));
      if (got == 0) return bytes;
    }
  }

  /// After the content of a compressed file: only zeros follow it.
  void check_end() const {
    const auto used = static_cast<std::size_t>(archive_filter_bytes(archive_.get(), -1));
    if (!all_zero(packed_.subspan(std::min(used, packed_.size())))) {
      throw std::runtime_error("the " + std::string(archive_filter_name(archive_.get(), 0)) +
                               " file is damaged at byte " + std::to_string(used));
    }
  }

 private:
  [[noreturn]] void fail() const {
    const char* reason = archive_error_string(archive_.get());
    throw std::runtime_error(
        std::string("cannot be unpacked (truncated, damaged, encrypted or of an unknown kind): ") +
        (reason != nullptr ? reason : "no reason given"));
  }

  View packed_;
  std::unique_ptr<archive, int (*)(archive*)> archive_{archive_read_new(), archive_read_free};
};

/// A header of cpio in ASCII: after its magic come numbers alone.
bool is_cpio(View bytes) {
  constexpr std::size_t kShortestHeader = 76;
  const auto is_digit = [](std::uint8_t byte) { return std::isxdigit(byte) != 0; };
  const bool magic =
      starts_with(bytes, "070701") || starts_with(bytes, "070702") || starts_with(bytes, "070707");
  return magic && bytes.size() >= kShortestHeader &&
         std::ranges::all_of(bytes.first(kShortestHeader), is_digit);
}

/// The two bytes of its header alone begin other files too.
bool is_zlib(View bytes) {
  using namespace std::string_view_literals;
  const bool marked = starts_with(bytes, "x\x01"sv) || starts_with(bytes, "x\x9c"sv) ||
                      starts_with(bytes, "x\xda"sv);
  if (!marked) return false;
  z_stream stream{};
  if (::inflateInit(&stream) != Z_OK) throw std::bad_alloc();
  const std::unique_ptr<z_stream, int (*)(z_streamp)> end(&stream, ::inflateEnd);
  std::array<Bytef, 4096> inflated{};
  stream.next_in = const_cast<std::uint8_t*>(bytes.data());  // zlib only reads it
  stream.avail_in = static_cast<uInt>(std::min<std::size_t>(bytes.size(), 1024));
  stream.next_out = inflated.data();
  stream.avail_out = inflated.size();
  const int code = ::inflate(&stream, Z_NO_FLUSH);
  return code == Z_OK || code == Z_STREAM_END;
}

/// By the first bytes, zeros among them.
void refuse_unread(View bytes) {
  using namespace std::string_view_literals;
  constexpr std::pair<std::string_view, const char*> kUnread[] = {
      {"\x89LZO\0\r\n\x1a\n"sv, "an lzop file"}, {"LRZI\0"sv, "an lrzip file"},
      {"MSCF\0\0\0\0"sv, "a cabinet"},           {"!<arch>\n"sv, "an ar archive"},
      {"ARROW1\0\0"sv, "an Arrow file"},         {"\xff\6\0\0sNaPpY"sv, "a Snappy stream"},
  };
  const auto refuse = [](const std::string& name) {
    throw Unread("is " + name + ", which is not read: unpack it first");
  };
  for (const auto& [magic, name] : kUnread) {
    if (starts_with(bytes, magic)) refuse(name);
  }
  if (is_cpio(bytes)) refuse("a cpio archive");
  if (is_zlib(bytes)) refuse("a zlib stream");
}

/// Nothing where the bytes are not compressed.
std::optional<Bytes> decompressed(View bytes) {
  if (bytes.empty()) return std::nullopt;
  refuse_unread(bytes);
  if (starts_with(bytes, "\x1f\x8b\x08")) return gunzip(bytes);
  Reader reader(bytes, {archive_read_support_filter_bzip2, archive_read_support_filter_compress,
                        archive_read_support_filter_lz4, archive_read_support_filter_lzip,
                        archive_read_support_filter_lzma, archive_read_support_filter_xz,
                        archive_read_support_filter_zstd, archive_read_support_format_raw});
  if (reader.next() == nullptr) return Bytes();
  if (reader.plain()) return std::nullopt;
  Bytes content = reader.content();
  reader.check_end();
  return content;
}

/// Recognised by its first bytes: what only ends as an archive is a plain file.
Reader open_archive(View bytes) {
  // By its directory, at the end: without that, a file cut between two entries would seem whole.
  for (const char* zip : {"PK\3\4", "PK\5\6", "PK\7\10"}) {
    if (starts_with(bytes, zip)) return {bytes, {archive_read_support_format_zip_seekable}};
  }
  if (starts_with(bytes, "7z\xbc\xaf\x27\x1c")) {
    return {bytes, {archive_read_support_format_7zip}};
  }
  if (starts_with(bytes, "Rar!\x1a\x07")) {
    return {bytes, {archive_read_support_format_rar, archive_read_support_format_rar5}};
  }
  // libarchive takes a file that begins with 512 zeros for an empty tar.
  if (bytes.front() == 0) return {bytes, {archive_read_support_format_raw}};
  return {bytes, {archive_read_support_format_tar, archive_read_support_format_raw}};
}

std::string name_of(archive_entry* entry) {
  const char* name = archive_entry_pathname_utf8(entry);
  if (name == nullptr) name = archive_entry_pathname(entry);
  return name != nullptr ? name : "a file without a name";
}

/// The one file of an archive; nothing where the bytes are none.
std::optional<Bytes> only_file(View bytes) {
  if (bytes.empty()) return std::nullopt;
  Reader reader = open_archive(bytes);
  constexpr std::size_t kNamesShown = 5;
  std::vector<std::string> names;
  Bytes content;
  while (archive_entry* entry = reader.next()) {
    if (reader.plain()) return std::nullopt;
    if (archive_entry_filetype(entry) != AE_IFREG) continue;
    names.push_back(name_of(entry));
    if (names.size() == 1) content = reader.content();
    if (names.size() > kNamesShown) break;
  }
  if (names.size() == 1) return content;
  if (names.empty()) throw Unread("the archive holds no file");
  std::string list;
  for (std::size_t i = 0; i < std::min(names.size(), kNamesShown); ++i) {
    list += (i == 0 ? "" : ", ") + names[i];
  }
  if (names.size() > kNamesShown) list += ", ...";
  throw Unread("the archive holds several files (" + list + "): unpack one of them");
}

}  // namespace

std::vector<std::uint8_t> unpacked(std::vector<std::uint8_t> bytes) {
  bool was_packed = false;
  const auto unpack = [&](std::optional<Bytes> (*content_of)(View)) {
    std::optional<Bytes> content = content_of(bytes);
    if (!content) return;
    bytes = std::move(*content);
    was_packed = true;
  };
  unpack(decompressed);
  unpack(only_file);
  if (was_packed && (decompressed(bytes) || only_file(bytes)))
    throw std::runtime_error("holds a file that is packed again: unpack it first");
  return bytes;
}

bool is_packed(std::span<const std::uint8_t> head) {
  const Bytes bytes(head.begin(), head.end());
  try {
    return unpacked(bytes) != bytes;
  } catch (const std::runtime_error&) {  // of a packed form, and cut short
    return true;
  }
}

}  // namespace gateloop::corpus
