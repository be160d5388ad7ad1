#include <gtest/gtest.h>
#include <zlib.h>

#include <functional>
#include <string>

#include "gateloop/training.h"
#include "small_run.h"
#include "temporary_directory.h"

namespace gateloop::training {
namespace {

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
  EXPECT_NE(message_of([&] { Corpus(dir.path()); }).find("not a regular file"), std::string::npos);
  EXPECT_NE(message_of([&] { Corpus(dir / "empty"); }).find("empty"), std::string::npos);
  EXPECT_NE(message_of([&] {
              Corpus(dir / "text", Split{90, 10, 1});
            }).find("larger than the file"),
            std::string::npos);
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  EXPECT_NE(message_of([&] {
              Corpus(dir / "text", Split{kHuge, kHuge, 2});
            }).find("larger than the file"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              Corpus(dir / "text", Split{50, -1, 0});
            }).find("negative"),
            std::string::npos);
}

TEST(Corpus, FingerprintTellsOneByte) {
  const TemporaryDirectory dir;
  std::string text = test::small_text(3000);
  write_bytes(dir / "a", text);
  text[1500] ^= 1;
  write_bytes(dir / "b", text);
  EXPECT_NE(Corpus(dir / "a").fingerprint(), Corpus(dir / "b").fingerprint());
}

}  // namespace
}  // namespace gateloop::training
