#include "gateloop/corpus.h"

#include <zlib.h>

#include <algorithm>
#include <stdexcept>

#include "corpus/unpack.h"
#include "model/file.h"

namespace gateloop::corpus {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& problem) {
  throw std::runtime_error(path.string() + ": " + problem);
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

Corpus::Corpus(const std::filesystem::path& path, std::optional<Split> split) : path_(path) {
  // Not mapped: a mapped file that another process cuts short is a SIGBUS, here an error of read().
  const model::InputFile file(path);
  bytes_.resize(file.size());
  file.read(bytes_.data(), bytes_.size(), 0);
  try {
    bytes_ = unpacked(std::move(bytes_));
  } catch (const std::runtime_error& error) {
    fail(path, error.what());
  }
  if (bytes_.empty()) fail(path, file.size() == 0 ? "the file is empty" : "holds no bytes");
  const auto size = static_cast<std::int64_t>(bytes_.size());
  split_ = split.value_or(default_split(size));
  check_split(path, split_, size);
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

}  // namespace gateloop::corpus
