#pragma once

/// Broken files from whole ones, the same for the same seed.
#include <cstdint>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace gateloop::fuzz {

class Mutator {
 public:
  Mutator(std::vector<std::string> seeds, std::uint64_t seed)
      : seeds_(std::move(seeds)), random_(seed) {}

  /// One to eight changes to one of the seeds.
  std::string next() {
    std::string bytes = seeds_[below(seeds_.size())];
    for (std::uint64_t changes = 1 + below(8); changes > 0; --changes) change(bytes);
    return bytes;
  }

 private:
  std::uint64_t below(std::uint64_t n) { return n == 0 ? 0 : random_() % n; }

  void change(std::string& bytes) {
    const std::size_t at = below(bytes.size() + 1);
    switch (below(8)) {
      case 0:  // flip a bit
        if (at < bytes.size()) bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:  // any byte
        if (at < bytes.size()) bytes[at] = static_cast<char>(below(256));
        break;
      case 2:  // cut the end off
        bytes.resize(at);
        break;
      case 3:  // leave a piece out
        bytes.erase(at, below(32));
        break;
      case 4: {  // repeat a piece, or take one from another seed
        const std::string& from = below(2) == 0 ? bytes : seeds_[below(seeds_.size())];
        const std::size_t begin = below(from.size() + 1);
        bytes.insert(at, from.substr(begin, below(64)));
        break;
      }
      case 5: {  // a number at its limits, as text
        static const char* const kTexts[] = {"-1",
                                             "0",
                                             "18446744073709551615",
                                             "9223372036854775807",
                                             "-9223372036854775808",
                                             "1e999",
                                             "NaN",
                                             "null",
                                             "[]",
                                             "{}",
                                             "\"\"",
                                             "[[[[[[[["};
        const std::string text = kTexts[below(std::size(kTexts))];
        const std::size_t digit = bytes.find_first_of("0123456789", at);
        if (digit == std::string::npos) break;
        bytes.replace(digit, bytes.find_first_not_of("0123456789", digit) - digit, text);
        break;
      }
      case 7:  // deep nesting
        bytes.insert(at, std::string(1 + below(200'000), '['));
        break;
      case 6: {  // a number at its limits, as eight bytes
        static const std::uint64_t kValues[] = {
            0, 1, 0x7F, 0xFFFF, 0x7FFFFFFFFFFFFFFF, ~0ULL, std::uint64_t{1} << 40};
        const std::uint64_t value = kValues[below(std::size(kValues))];
        for (std::size_t i = 0; i < 8 && at + i < bytes.size(); ++i) {
          bytes[at + i] = static_cast<char>(value >> (8 * i));
        }
        break;
      }
    }
  }

  std::vector<std::string> seeds_;
  std::mt19937_64 random_;
};

}  // namespace gateloop::fuzz
