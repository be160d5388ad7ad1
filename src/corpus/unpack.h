#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace gateloop::corpus {

/// Of an archive of several files or of none, and of a packed form that is not read. In a folder
/// such a file is left out.
struct Unread : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The bytes that `bytes`, the content of a file, hold in packed form; `bytes` itself where its
/// first bytes are of no packed form. Throws std::runtime_error for what is truncated, damaged,
/// encrypted or packed in an unknown way, and Unread.
std::vector<std::uint8_t> unpacked(std::vector<std::uint8_t> bytes);

/// Whether a file that begins with `head` is of a packed form.
bool is_packed(std::span<const std::uint8_t> head);

}  // namespace gateloop::corpus
