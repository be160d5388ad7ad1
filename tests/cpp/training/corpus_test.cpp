#include <archive.h>
#include <archive_entry.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/training.h"
#include "small_run.h"
#include "temporary_directory.h"
#include "training/files.h"

namespace gateloop::training {
namespace {

using corpus::kSeparator;
using test::TemporaryDirectory;
using test::write_bytes;

std::string text_of(std::span<const std::uint8_t> bytes) { return {bytes.begin(), bytes.end()}; }

void write_gzip(const std::filesystem::path& path, const std::string& text,
                const char* mode = "wb") {
  gzFile file = ::gzopen(path.c_str(), mode);
  ASSERT_EQ(::gzwrite(file, text.data(), static_cast<unsigned>(text.size())),
            static_cast<int>(text.size()));
  ASSERT_EQ(::gzclose(file), Z_OK);
}

using Step = int (*)(archive*);
using Files = std::vector<std::pair<std::string, std::string>>;

void write_archive(const std::filesystem::path& path, Step format, Step filter, const Files& files,
                   const char* options = nullptr) {
  const std::unique_ptr<archive, int (*)(archive*)> out(archive_write_new(), archive_write_free);
  ASSERT_EQ(format(out.get()), ARCHIVE_OK);
  ASSERT_EQ(filter(out.get()), ARCHIVE_OK);
  ASSERT_EQ(archive_write_set_options(out.get(), options), ARCHIVE_OK);
  archive_write_set_passphrase(out.get(), "secret");
  ASSERT_EQ(archive_write_set_bytes_in_last_block(out.get(), 1), ARCHIVE_OK);
  ASSERT_EQ(archive_write_open_filename(out.get(), path.c_str()), ARCHIVE_OK);
  for (const auto& [name, text] : files) {
    const std::unique_ptr<archive_entry, void (*)(archive_entry*)> entry(archive_entry_new(),
                                                                         archive_entry_free);
    const bool folder = name.ends_with('/');
    archive_entry_set_pathname(entry.get(), name.c_str());
    archive_entry_set_filetype(entry.get(), folder ? AE_IFDIR : AE_IFREG);
    archive_entry_set_perm(entry.get(), 0644);
    if (!folder) archive_entry_set_size(entry.get(), static_cast<la_int64_t>(text.size()));
    ASSERT_EQ(archive_write_header(out.get(), entry.get()), ARCHIVE_OK);
    ASSERT_EQ(archive_write_data(out.get(), text.data(), text.size()), std::ssize(text));
  }
  ASSERT_EQ(archive_write_close(out.get()), ARCHIVE_OK);
}

struct Packing {
  const char* name;
  Step format;
  Step filter;
  bool has_checksum;  // of the content
};
const Packing kPackings[] = {
    {"bz2", archive_write_set_format_raw, archive_write_add_filter_bzip2, true},
    {"lz", archive_write_set_format_raw, archive_write_add_filter_lzip, true},
    {"lzma", archive_write_set_format_raw, archive_write_add_filter_lzma, false},
    {"lz4", archive_write_set_format_raw, archive_write_add_filter_lz4, true},
    {"xz", archive_write_set_format_raw, archive_write_add_filter_xz, true},
    {"Z", archive_write_set_format_raw, archive_write_add_filter_compress, false},
    {"zst", archive_write_set_format_raw, archive_write_add_filter_zstd, false},
    {"7z", archive_write_set_format_7zip, archive_write_add_filter_none, true},
    {"tar", archive_write_set_format_ustar, archive_write_add_filter_none, false},
    {"tar.gz", archive_write_set_format_ustar, archive_write_add_filter_gzip, true},
    {"tar.xz", archive_write_set_format_ustar, archive_write_add_filter_xz, true},
    {"zip", archive_write_set_format_zip, archive_write_add_filter_none, true},
};

std::string zlib_stream(int level) {
  const std::string text = test::small_text(5000);
  uLongf size = ::compressBound(text.size());
  std::string packed(size, '\0');
  const auto* const bytes = reinterpret_cast<const Bytef*>(text.data());
  EXPECT_EQ(::compress2(reinterpret_cast<Bytef*>(packed.data()), &size, bytes, text.size(), level),
            Z_OK);
  packed.resize(size);
  return packed;
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Corpus, SplitsNinetyFiveFiveByDefault) {
  const TemporaryDirectory dir;
  const std::string text = test::small_text(1000);
  write_bytes(dir / "text", text);
  const Corpus corpus(dir / "text");
  EXPECT_EQ(corpus.split(), (Split{900, 50, 50}));
  EXPECT_EQ(text_of(corpus.train()), text.substr(0, 900));
  EXPECT_EQ(text_of(corpus.valid()), text.substr(900, 50));
  EXPECT_EQ(text_of(corpus.test()), text.substr(950));
}

TEST(Corpus, SplitsByBytesAndSaysSo) {
  const TemporaryDirectory dir;
  const std::string text = test::small_text(1'234'567);
  write_bytes(dir / "text", text);
  const Corpus corpus(dir / "text", Split{1'000'000, 200, 300});
  EXPECT_EQ(text_of(corpus.valid()), text.substr(1'000'000, 200));
  EXPECT_EQ(text_of(corpus.test()), text.substr(1'000'200, 300));
  EXPECT_EQ(corpus.description(), (dir / "text").string() +
                                      ": 1,234,567 bytes (1,000,000 train, 200 valid, 300 test, "
                                      "234,067 unused)");
}

TEST(Corpus, ReadsGzipOfSeveralMembers) {
  const TemporaryDirectory dir;
  const std::string text = test::small_text(10'000'000);  // more than one chunk of the reader
  write_gzip(dir / "text.gz", text);
  write_gzip(dir / "text.gz", "and more", "ab");
  write_bytes(dir / "text", text + "and more");
  const Corpus corpus(dir / "text.gz");
  EXPECT_EQ(text_of(corpus.bytes()), text + "and more");
  EXPECT_EQ(corpus.fingerprint(), Corpus(dir / "text").fingerprint());
}

TEST(Corpus, AcceptsZerosAfterTheLastMember) {
  const TemporaryDirectory dir;
  const std::string text = test::small_text(5000);
  write_gzip(dir / "gz", text);
  write_archive(dir / "bz2", archive_write_set_format_raw, archive_write_add_filter_bzip2,
                {{"text", text}});
  for (const char* name : {"gz", "bz2"}) {
    write_bytes(dir / name, test::read_bytes(dir / name) + std::string(700, '\0'));
    EXPECT_EQ(text_of(Corpus(dir / name).bytes()), text) << name;
  }
}

TEST(Corpus, ABrokenSecondMemberIsAnError) {
  const TemporaryDirectory dir;
  write_gzip(dir / "gz", test::small_text(5000));
  write_archive(dir / "bz2", archive_write_set_format_raw, archive_write_add_filter_bzip2,
                {{"text", test::small_text(5000)}});
  write_archive(dir / "xz", archive_write_set_format_raw, archive_write_add_filter_xz,
                {{"text", test::small_text(5000)}});
  for (const char* name : {"gz", "bz2", "xz"}) {
    const std::string member = test::read_bytes(dir / name);
    for (const std::size_t broken : {std::size_t{0}, std::size_t{2}, member.size() / 2}) {
      std::string second = member;
      second[broken] ^= 1;
      write_bytes(dir / "broken", member + second);
      const std::string message = message_of([&] { Corpus(dir / "broken"); });
      EXPECT_NE(message.find("damaged"), std::string::npos) << name << broken << message;
      EXPECT_NE(message.find((dir / "broken").string()), std::string::npos) << message;
    }
    write_bytes(dir / "cut", member + member.substr(0, member.size() / 2));
    EXPECT_NE(message_of([&] { Corpus(dir / "cut"); }).find("truncated"), std::string::npos);
  }
}

TEST(Corpus, UnpacksByTheFirstBytesNotByTheName) {
  const TemporaryDirectory dir;
  const std::string text = test::small_text(5'000'000);  // more than one chunk of the reader
  write_bytes(dir / "plain", text);
  const std::string fingerprint = Corpus(dir / "plain").fingerprint();
  for (const Packing& packing : kPackings) {
    Files files = {{"folder/", ""}, {"folder/text", text}};
    if (packing.format == archive_write_set_format_raw) files.erase(files.begin());
    write_archive(dir / "packed", packing.format, packing.filter, files);
    EXPECT_LT(std::filesystem::file_size(dir / "packed"), 5'100'000U) << packing.name;
    EXPECT_EQ(Corpus(dir / "packed").fingerprint(), fingerprint) << packing.name;
  }
}

TEST(Corpus, WhatIsPackedAndNotWholeIsAnError) {
  const TemporaryDirectory dir;
  for (const Packing& packing : kPackings) {
    write_archive(dir / "whole", packing.format, packing.filter,
                  {{"text", test::small_text(200'000)}});
    const std::string bytes = test::read_bytes(dir / "whole");
    const auto expect_refused = [&](const std::string& content) {
      write_bytes(dir / "part", content);
      const std::string message = message_of([&] { Corpus(dir / "part"); });
      EXPECT_NE(message.find((dir / "part").string()), std::string::npos) << packing.name;
      EXPECT_NE(message.find("truncated"), std::string::npos) << packing.name << ": " << message;
    };
    if (packing.name == std::string("Z")) continue;  // the format has no end and no checksum
    expect_refused(bytes.substr(0, bytes.size() / 2));
    if (packing.name != std::string("tar")) expect_refused(bytes.substr(0, bytes.size() - 9));
    std::string damaged = bytes;
    damaged[bytes.size() / 2] ^= 1;
    if (packing.has_checksum) {
      write_bytes(dir / "part", damaged);
      const std::string message = message_of([&] { Corpus(dir / "part"); });
      EXPECT_NE(message.find("damaged"), std::string::npos) << packing.name << ": " << message;
    }
  }
}

TEST(Corpus, AnArchiveMustHoldOneReadableFile) {
  const TemporaryDirectory dir;
  const Step none = archive_write_add_filter_none;
  const Files two = {{"first", test::small_text(5000)}, {"second", test::small_text(5000)}};
  const auto message = [&] { return message_of([&] { Corpus(dir / "archive"); }); };
  for (const Step format : {archive_write_set_format_zip, archive_write_set_format_ustar}) {
    write_archive(dir / "archive", format, none, two);
    EXPECT_NE(message().find("several files (first, second)"), std::string::npos) << message();
    write_archive(dir / "archive", format, none, {{"folder/", ""}});
    EXPECT_NE(message().find("holds no file"), std::string::npos) << message();
    write_archive(dir / "archive", format, none, {{"file", ""}});
    EXPECT_NE(message().find("holds no bytes"), std::string::npos) << message();
  }
  write_archive(dir / "archive", archive_write_set_format_zip, none,
                {{"text", test::small_text(5000)}}, "zip:encryption=traditional");
  EXPECT_NE(message().find("encrypted"), std::string::npos) << message();
  // Cut between two files, a zip file has a whole first one and no directory.
  write_archive(dir / "archive", archive_write_set_format_zip, none, two);
  const std::string bytes = test::read_bytes(dir / "archive");
  write_bytes(dir / "archive", bytes.substr(0, bytes.find("PK\3\4", 4)));
  EXPECT_NE(message().find("truncated"), std::string::npos) << message();
}

TEST(Corpus, PlainFilesThatBeginOddlyStayAsTheyAre) {
  const TemporaryDirectory dir;
  write_archive(dir / "zip", archive_write_set_format_zip, archive_write_add_filter_none,
                {{"text", test::small_text(5000)}});
  const std::string beginnings[] = {"PK is short for a name. ",
                                    "BZh91 is a road. ",
                                    "LZIP packs. ",
                                    "\x1f\x8b",
                                    "Rar! he cried. ",
                                    "7z\n",
                                    "begin 644 text\n",
                                    "WARC/1.0\n",
                                    "#mtree\n",
                                    "070701,070702,070703\n",
                                    "xmas. ",
                                    "!<arch> ",
                                    "x\xda",
                                    "x\x9c is Latin-1. ",
                                    std::string(2000, '\0'),
                                    "\xfd"
                                    "7zXZ",
                                    "\x28\xb5\x2f\n",
                                    test::read_bytes(dir / "zip").substr(1)};
  for (const std::string& beginning : beginnings) {
    const std::string text = beginning + test::small_text(3000);
    write_bytes(dir / "text", text);
    EXPECT_EQ(text_of(Corpus(dir / "text").bytes()), text) << beginning.substr(0, 20);
    write_bytes(dir / "text", test::small_text(3000) + beginning);
    EXPECT_EQ(Corpus(dir / "text").bytes().size(), text.size()) << beginning.substr(0, 20);
  }
}

TEST(Corpus, RefusesByNameWhatStaysPacked) {
  const TemporaryDirectory dir;
  using namespace std::string_literals;
  for (const std::string& packed :
       {"\x89LZO\0\r\n\x1a\n"s, "LRZI\0\6"s, "MSCF\0\0\0\0"s, "!<arch>\n"s, zlib_stream(1),
        zlib_stream(6), zlib_stream(9), "ARROW1\0\0"s, "\xff\6\0\0sNaPpY"s,
        "070701" + std::string(104, 'A'), "070707" + std::string(70, '7')}) {
    write_bytes(dir / "packed", packed + test::small_text(3000));
    EXPECT_NE(message_of([&] { Corpus(dir / "packed"); }).find("which is not read"),
              std::string::npos);
    // In a folder it is one of the files that are no text.
    std::filesystem::create_directory(dir / "folder");
    write_bytes(dir / "folder/text", test::small_text(3000));
    std::filesystem::rename(dir / "packed", dir / "folder/packed");
    EXPECT_EQ(Corpus(dir / "folder").bytes().size(), 3000U);
  }
  write_gzip(dir / "inner", test::small_text(3000));
  write_gzip(dir / "outer", test::read_bytes(dir / "inner"));
  EXPECT_NE(message_of([&] { Corpus(dir / "outer"); }).find("is packed again"), std::string::npos);
  write_archive(dir / "zip", archive_write_set_format_zip, archive_write_add_filter_none,
                {{"text.gz", test::read_bytes(dir / "inner")}});
  EXPECT_NE(message_of([&] { Corpus(dir / "zip"); }).find("is packed again"), std::string::npos);
}

TEST(Corpus, TruncatedOrDamagedGzipIsAnError) {
  const TemporaryDirectory dir;
  write_gzip(dir / "whole.gz", test::small_text(50'000));
  const std::string bytes = test::read_bytes(dir / "whole.gz");
  for (const std::size_t size :
       {bytes.size() - 1, bytes.size() - 8, bytes.size() / 2, std::size_t{10}}) {
    write_bytes(dir / "cut.gz", bytes.substr(0, size));
    EXPECT_NE(message_of([&] { Corpus(dir / "cut.gz"); }).find("truncated"), std::string::npos)
        << size << " of " << bytes.size() << " bytes";
  }
  std::string damaged = bytes;
  damaged[damaged.size() - 6] ^= 1;  // in the checksum
  write_bytes(dir / "damaged.gz", damaged);
  EXPECT_NE(message_of([&] { Corpus(dir / "damaged.gz"); }).find("damaged"), std::string::npos);
}

TEST(Corpus, ErrorsNameThePathAndTheProblem) {
  const TemporaryDirectory dir;
  write_bytes(dir / "empty", "");
  write_bytes(dir / "text", test::small_text(100));
  const std::string missing = message_of([&] { Corpus(dir / "none"); });
  EXPECT_NE(missing.find((dir / "none").string()), std::string::npos) << missing;
  EXPECT_NE(missing.find("No such file"), std::string::npos) << missing;
  EXPECT_NE(message_of([&] { Corpus(dir / "empty"); }).find("empty"), std::string::npos);
  EXPECT_NE(message_of([&] {
              Corpus(dir / "text", Split{90, 10, 1});
            }).find("larger than the text"),
            std::string::npos);
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  EXPECT_NE(message_of([&] {
              Corpus(dir / "text", Split{kHuge, kHuge, 2});
            }).find("larger than the text"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              Corpus(dir / "text", Split{50, -1, 0});
            }).find("negative"),
            std::string::npos);
}

TEST(Corpus, ReadsFilesAndFoldersInOrder) {
  const TemporaryDirectory dir;
  std::filesystem::create_directories(dir / "books/b");
  write_bytes(dir / "books/c", "third ");
  write_bytes(dir / "books/b/z", "second ");
  write_bytes(dir / "books/B", "first ");
  write_gzip(dir / "books/d.gz", "fourth ");
  write_bytes(dir / "a, b", "last");  // as if it came of a list
  const Corpus corpus(Sources{.paths = {dir / "books", dir / "a, b", dir / "a, b"}},
                      Split{30, 3, 1});
  EXPECT_EQ(text_of(corpus.bytes()), "first second third fourth lastlast");
  EXPECT_EQ(corpus.description(), (dir / "books").string() + ", " + (dir / "a, b").string() + ", " +
                                      (dir / "a, b").string() +
                                      ": 6 files, 34 bytes (30 train, 3 valid, 1 test)");
  EXPECT_EQ(corpus.left_out(), "");
}

TEST(Corpus, TheSplitIsOfAllFiles) {
  const TemporaryDirectory dir;
  for (const char* name : {"a", "b", "c", "d"}) write_bytes(dir / name, test::small_text(50));
  const Corpus corpus(Sources{.paths = {dir / "a", dir / "b", dir / "c", dir / "d"}});
  EXPECT_EQ(corpus.split(), (Split{180, 10, 10}));
  EXPECT_EQ(corpus.name(), (dir / "a").string() + ", " + (dir / "b").string() + " and 2 more");
}

TEST(Corpus, LeavesOutOfFoldersWhatIsNoText) {
  const TemporaryDirectory dir;
  std::filesystem::create_directories(dir / "books/.git");
  write_bytes(dir / "books/.git/config", "hidden");
  write_bytes(dir / "books/.hidden", "hidden");
  write_bytes(dir / "books/empty", "");
  write_bytes(dir / "books/picture.png", std::string("\x89PNG\r\n\x1a\n\0\0\0\r", 12));
  write_gzip(dir / "books/picture.gz", std::string("\0", 1));
  write_bytes(dir / "books/text", "text");
  const Corpus corpus(dir / "books");
  EXPECT_EQ(text_of(corpus.bytes()), "text");
  EXPECT_EQ(corpus.left_out(), "2 files that are no text: " + (dir / "books/picture.gz").string() +
                                   ", " + (dir / "books/picture.png").string());
  // What is given itself is read.
  EXPECT_EQ(Corpus(dir / "books/picture.png").bytes().size(), 12U);
  EXPECT_EQ(text_of(Corpus(dir / "books/.hidden").bytes()), "hidden");
  std::filesystem::remove(dir / "books/text");
  EXPECT_NE(
      message_of([&] { Corpus(dir / "books"); }).find("books: holds no text; left out: 2 files"),
      std::string::npos);
}

TEST(Corpus, LeavesOutOfFoldersArchivesOfSeveralFiles) {
  const TemporaryDirectory dir;
  write_bytes(dir / "a.txt", "text");
  const auto archive = dir / "report.docx";
  write_archive(archive, archive_write_set_format_zip, archive_write_add_filter_none,
                {{"a.xml", "<a/>"}, {"b.xml", "<b/>"}});
  const Corpus corpus(dir / "");
  EXPECT_EQ(text_of(corpus.bytes()), "text");
  EXPECT_NE(corpus.left_out().find("report.docx"), std::string::npos);
  EXPECT_THROW(Corpus{archive}, std::runtime_error);
}

/// A file of holes: reading it whole would take its size in memory.
TEST(Corpus, LeavesOutALargeFileByItsFirstBytes) {
  const TemporaryDirectory dir;
  write_bytes(dir / "a.txt", "text");
  write_bytes(dir / "b.bin", std::string("\0\1\2", 3));
  std::filesystem::resize_file(dir / "b.bin", std::uintmax_t{1} << 40);
  EXPECT_EQ(text_of(Corpus(dir / "").bytes()), "text");
}

TEST(Corpus, FollowsLinksAndRefusesLoops) {
  const TemporaryDirectory dir;
  std::filesystem::create_directories(dir / "books/novels");
  std::filesystem::create_directories(dir / "elsewhere");
  write_bytes(dir / "elsewhere/text", "text");
  std::filesystem::create_symlink(dir / "elsewhere/text", dir / "books/a");
  std::filesystem::create_symlink(dir / "elsewhere", dir / "books/b");
  EXPECT_EQ(text_of(Corpus(dir / "books").bytes()), "texttext");
  std::filesystem::create_symlink("..", dir / "books/novels/up");
  const std::string loop = message_of([&] { Corpus(dir / "books"); });
  EXPECT_EQ(loop, (dir / "books/novels/up").string() + ": is a link back to " +
                      (dir / "books").string() + ", in which it lies");
  std::filesystem::remove(dir / "books/novels/up");
  std::filesystem::create_symlink("nowhere", dir / "books/c");
  EXPECT_NE(message_of([&] { Corpus(dir / "books"); }).find("books/c: is a link to nothing"),
            std::string::npos);
}

TEST(Corpus, ErrorsInAFolderNameTheFile) {
  const TemporaryDirectory dir;
  std::filesystem::create_directories(dir / "books");
  EXPECT_EQ(message_of([&] { Corpus(dir / "books"); }),
            (dir / "books").string() + ": holds no text");
  write_bytes(dir / "books/a", "text");
  write_gzip(dir / "books/b.gz", test::small_text(5000));
  const std::string packed = test::read_bytes(dir / "books/b.gz");
  write_bytes(dir / "books/b.gz", packed.substr(0, packed.size() / 2));
  EXPECT_EQ(message_of([&] { Corpus(dir / "books"); }),
            (dir / "books/b.gz").string() + ": the gzip file is truncated");
  write_bytes(dir / "empty", "");
  EXPECT_EQ(message_of([&] {
              Corpus(Sources{.paths = {dir / "books/a", dir / "empty"}});
            }),
            (dir / "empty").string() + ": the file is empty");
}

/// What Corpus says of `lines` as JSON lines.
std::string message_of_lines(const std::string& lines, const std::string& field = "text") {
  const TemporaryDirectory dir;
  write_bytes(dir / "a.jsonl", lines);
  const std::string message =
      message_of([&] { Corpus(Sources{.paths = {dir / "a.jsonl"}, .field = field}); });
  const std::string name = (dir / "a.jsonl").string() + ": ";
  return message.starts_with(name) ? message.substr(name.size()) : message;
}

TEST(JsonLines, TheTextIsTheFieldOfEachLine) {
  const TemporaryDirectory dir;
  write_gzip(dir / "a.jsonl.gz",
             "{\"text\": \"one\\u00e9\\n\", \"id\": 1}\r\n\n  \n{\"id\": [2], \"text\": \"\"}\n"
             "{\"text\": \"three\"}");
  write_bytes(dir / "b", "{\"text\": \"four\"}\n");
  const Corpus corpus(Sources{.paths = {dir / "a.jsonl.gz", dir / "b"}, .field = "text"});
  EXPECT_EQ(text_of(corpus.bytes()), "one\xC3\xA9\n\n\nthree\nfour\n");
}

TEST(JsonLines, DotsLeadIntoObjects) {
  const TemporaryDirectory dir;
  write_bytes(dir / "a",
              "{\"a\": {\"b.c\": {\"d\": \"inner\"}, \"b\": 1}, \"a.b\": {}}\n"
              "{\"a.b.c.d\": \"whole\", \"a\": {\"b.c\": {\"d\": \"inner\"}}}\n");
  const Corpus corpus(Sources{.paths = {dir / "a"}, .field = "a.b.c.d"});
  EXPECT_EQ(text_of(corpus.bytes()), "inner\nwhole\n");
}

TEST(JsonLines, OfAFolderOnlyFilesSoNamedAreRead) {
  const TemporaryDirectory dir;
  std::filesystem::create_directories(dir / "rows");
  write_bytes(dir / "rows/a.jsonl", "{\"text\": \"a\"}");
  write_gzip(dir / "rows/b.ndjson.gz", "{\"text\": \"b\"}");
  write_bytes(dir / "rows/README.md", "no JSON");
  write_bytes(dir / "rows/jsonl", "no JSON");
  const Corpus corpus(Sources{.paths = {dir / "rows"}, .field = "text"});
  EXPECT_EQ(text_of(corpus.bytes()), "a\nb\n");
  EXPECT_EQ(corpus.left_out(), "2 files that are no JSON lines (.jsonl, .ndjson): " +
                                   (dir / "rows/README.md").string() + ", " +
                                   (dir / "rows/jsonl").string());
  // One that is given is read as JSON lines whatever its name.
  EXPECT_NE(message_of([&] {
              Corpus(Sources{.paths = {dir / "rows/README.md"}, .field = "text"});
            }).find("rows/README.md: line 1: is no JSON: "),
            std::string::npos);
}

TEST(JsonLines, ErrorsNameTheLine) {
  const std::string good = "{\"text\": \"a\"}\n\n";
  EXPECT_EQ(message_of_lines(good + "{\"title\": \"a\", \"\\u001b\": 1}"),
            "line 3: there is no field \"text\" among \"\\u001b\", \"title\"");
  EXPECT_EQ(message_of_lines(good + "{\"text\": 3}"),
            "line 3: field \"text\" must be a string, got number");
  EXPECT_EQ(message_of_lines(good + "{\"text\": null}"),
            "line 3: field \"text\" must be a string, got null");
  EXPECT_EQ(message_of_lines(good + "[1]"), "line 3: a JSON object was expected, got array");
  EXPECT_EQ(message_of_lines(good + "{\"text\": \"" + std::string(5000, 'x')),
            "line 3: is no JSON: invalid string: missing closing quote (byte 5011)");
  EXPECT_EQ(message_of_lines(good + "{\"text\": \"\xff\"}"),
            "line 3: is no JSON: invalid string: ill-formed UTF-8 byte (byte 11)");
  EXPECT_EQ(message_of_lines(good + "{\"text\": " + std::string(100'000, '[')),
            "line 3: JSON nested 64 levels or deeper");
  EXPECT_EQ(message_of_lines(good + "{\"n\": 1e999}").find("line 3: is no JSON: "), 0);
  EXPECT_EQ(message_of_lines("\n\n"), "holds no text");
  EXPECT_EQ(message_of_lines("{\"a\": {\"b\": \"c\"}}", "a.c"),
            "line 1: there is no field \"a.c\" among \"a\"");
}

TEST(Corpus, NamesParquetFiles) {
  const TemporaryDirectory dir;
  write_bytes(dir / "rows.parquet", "PAR1 a footer PAR1");
  EXPECT_NE(message_of([&] { Corpus(dir / "rows.parquet"); }).find("is a parquet file"),
            std::string::npos);
  write_bytes(dir / "text", "PAR1 begins this text");
  EXPECT_EQ(Corpus(dir / "text").bytes().size(), 21U);
}

TEST(Documents, ASeparatorStandsAroundEach) {
  const TemporaryDirectory dir;
  std::filesystem::create_directories(dir / "books");
  write_bytes(dir / "books/a", "one\n");
  write_bytes(dir / "books/b", "two");
  write_bytes(dir / "rows", "{\"text\": \"three\"}\n{\"text\": \"\"}\n{\"text\": \"four\"}\n");
  const Corpus files(Sources{.paths = {dir / "books"}, .documents = true}, Split{5, 3, 2});
  EXPECT_EQ(text_of(files.bytes()), "\xFFone\n\xFFtwo\xFF");
  EXPECT_EQ(files.separator(), kSeparator);
  EXPECT_EQ(files.description(), (dir / "books").string() +
                                     ": 2 files, 2 documents, 10 bytes (5 train, 3 valid, 2 test)");
  const Corpus rows(Sources{.paths = {dir / "rows"}, .field = "text", .documents = true});
  EXPECT_EQ(text_of(rows.bytes()),
            "\xFFthree\xFF"
            "four\xFF");
  EXPECT_EQ(Corpus(dir / "books").separator(), std::nullopt);
}

TEST(Documents, MustNotHoldTheSeparator) {
  const TemporaryDirectory dir;
  write_bytes(dir / "latin", "na\xFFve");
  EXPECT_EQ(text_of(Corpus(dir / "latin").bytes()), "na\xFFve");
  EXPECT_NE(message_of([&] {
              Corpus(Sources{.paths = {dir / "latin"}, .documents = true});
            }).find("latin: byte 2 is 0xFF, which separates documents"),
            std::string::npos);
}

TEST(PathText, IsJsonAndRoundTrips) {
  for (const std::string path : {"/data/text", "/data/n\xC3\xA4me", "/data/100%",
                                 "/data/file:", "/data/\xFF%41 x", "/\xC3(", "/\xED\xA0\x80"}) {
    const std::string text = path_to_text(path);
    EXPECT_EQ(path_from_text(nlohmann::json::parse(nlohmann::json(text).dump())), path) << text;
  }
  EXPECT_EQ(path_to_text("/data/n\xC3\xA4me"), "/data/n\xC3\xA4me");
  EXPECT_EQ(path_to_text("/data/\xFF%41 x"), "file:///data/%FF%2541%20x");
  for (const char* text :
       {"file:///%", "file:///%4", "file:///%zz", "file:///% 4", "file:///%-1"}) {
    EXPECT_NE(message_of([&] { path_from_text(text); }).find("hexadecimal"), std::string::npos);
  }
}

TEST(Corpus, FingerprintTellsOneByte) {
  const TemporaryDirectory dir;
  std::string text = test::small_text(3000);
  write_bytes(dir / "a", text);
  text[1500] ^= 1;
  write_bytes(dir / "b", text);
  EXPECT_NE(Corpus(dir / "a").fingerprint(), Corpus(dir / "b").fingerprint());
}

TEST(Corpus, ChecksumTellsAByteBetweenTheSamplesOfTheFingerprint) {
  const TemporaryDirectory dir;
  std::string text(std::size_t{5} << 20, 'a');
  write_bytes(dir / "a", text);
  text[70'000] = 'b';
  write_bytes(dir / "b", text);
  const Corpus one(dir / "a"), other(dir / "b");
  EXPECT_EQ(one.fingerprint(), other.fingerprint());
  EXPECT_NE(one.checksum(), other.checksum());
  EXPECT_EQ(one.checksum(), Corpus(dir / "a").checksum());
}

TEST(Corpus, FingerprintsInRecordsOfRunsStayTheSame) {
  const TemporaryDirectory dir;
  write_bytes(dir / "a", "123456789");
  EXPECT_EQ(Corpus(dir / "a").fingerprint(), "9 bytes, crc cbf43926");  // CRC-32's check value
  EXPECT_EQ(Corpus(dir / "a").checksum(), "9 bytes, crc cbf43926");
}

}  // namespace
}  // namespace gateloop::training
