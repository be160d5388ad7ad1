#include <gtest/gtest.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <csignal>
#include <cstdint>
#include <fstream>
#include <string>

#include "gateloop/checkpoint.h"
#include "model/file.h"
#include "temporary_directory.h"

namespace gateloop::checkpoint {
namespace {

using test::TemporaryDirectory;

/// Files cannot grow beyond `bytes` while it lives: a disk that is full.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    handler_before_ = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_before_);
  }

 private:
  rlimit before_{};
  void (*handler_before_)(int);
};

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::int64_t files_in(const std::filesystem::path& dir) {
  return std::distance(std::filesystem::directory_iterator(dir), {});
}

TEST(AtomicFile, FullDiskKeepsTheOldFileAndRemovesTheTemporary) {
  const TemporaryDirectory dir;
  save_safetensors(dir / "x", {{{"t", torch::ones({8})}}, {}});
  const std::string before = read(dir / "x");
  {
    const FileSizeLimit limit(4096);
    try {
      save_safetensors(dir / "x", {{{"t", torch::ones({100'000})}}, {}});
      FAIL() << "400 kB were written under a limit of 4 kB";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("cannot write"), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("is unchanged"), std::string::npos) << error.what();
    }
  }
  EXPECT_EQ(read(dir / "x"), before);
  EXPECT_EQ(files_in(dir.path()), 1);
}

TEST(AtomicFile, ReplacesWhatAKilledSaveLeft) {
  const TemporaryDirectory dir;
  std::ofstream(dir / ".x.tmp") << "the half of a file";
  model::save_text(dir / "x", "whole");
  EXPECT_EQ(read(dir / "x"), "whole");
  EXPECT_EQ(files_in(dir.path()), 1);
}

TEST(AtomicFile, TwoThatWriteOneFileWriteItWhole) {
  const TemporaryDirectory dir;
  const std::string texts[] = {std::string(100'000, 'a'), std::string(70'000, 'b')};
  std::vector<std::thread> writers;
  for (const std::string& text : texts) {
    writers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) model::save_text(dir / "x", text);
    });
  }
  for (int i = 0; i < 50; ++i) {
    if (!std::filesystem::exists(dir / "x")) continue;
    const std::string found = read(dir / "x");
    EXPECT_TRUE(found == texts[0] || found == texts[1]) << found.size();
  }
  for (std::thread& writer : writers) writer.join();
  EXPECT_EQ(files_in(dir.path()), 1);
}

TEST(AtomicFile, SavesTextOverText) {
  const TemporaryDirectory dir;
  model::save_text(dir / "x", "first, and longer");
  model::save_text(dir / "x", "second");
  EXPECT_EQ(read(dir / "x"), "second");
}

}  // namespace
}  // namespace gateloop::checkpoint
