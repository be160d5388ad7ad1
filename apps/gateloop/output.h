#pragma once

/// Standard output, and words on it for a shell.
#include <filesystem>
#include <string>

namespace gateloop::app {

/// Opens /dev/null on each of the descriptors 0, 1 and 2 that is closed. So no data file gets that
/// number. It is opened for the other direction: a write to such an output fails.
void occupy_standard_descriptors();

/// Hands what was printed to the system. Throws std::runtime_error where standard output did not
/// take it all.
void flush_output();

/// `text` as one word for a POSIX shell.
std::string shell_word(const std::string& text);
/// The same of a file's name, which no program can then take for a flag.
std::string shell_path(const std::filesystem::path& path);

}  // namespace gateloop::app
