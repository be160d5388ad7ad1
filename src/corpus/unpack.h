#pragma once

#include <cstdint>
#include <vector>

namespace gateloop::corpus {

/// The bytes that `bytes`, the content of a file, hold in packed form; `bytes` itself where its
/// first bytes are of no packed form. Throws std::runtime_error for what is truncated, damaged,
/// encrypted or packed in an unknown way, and for an archive of several files or of none.
std::vector<std::uint8_t> unpacked(std::vector<std::uint8_t> bytes);

}  // namespace gateloop::corpus
