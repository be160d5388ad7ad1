#include "training/files.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string_view>

#include "gateloop/training.h"
#include "model/parse_json.h"

namespace gateloop::training {
namespace {

constexpr std::string_view kScheme = "file://";

bool is_unreserved(char byte) {
  constexpr std::string_view kUnreserved =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/";
  return kUnreserved.find(byte) != std::string_view::npos;
}

}  // namespace

std::string path_to_text(const std::filesystem::path& path) {
  std::string bytes = std::filesystem::absolute(path).lexically_normal().string();
  if (model::is_utf8(bytes)) return bytes;
  std::string text(kScheme);
  for (const char byte : bytes) {
    if (is_unreserved(byte)) {
      text += byte;
      continue;
    }
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    const auto value = static_cast<unsigned char>(byte);
    text.append({'%', kDigits[value >> 4], kDigits[value & 15]});
  }
  return text;
}

std::filesystem::path path_from_text(const std::string& text) {
  if (!text.starts_with(kScheme)) return text;
  std::string bytes;
  for (std::size_t i = kScheme.size(); i < text.size(); ++i) {
    if (text[i] != '%') {
      bytes += text[i];
      continue;
    }
    unsigned char value = 0;
    const char* digits = text.data() + i + 1;
    const char* end = text.data() + std::min(text.size(), i + 3);
    if (std::from_chars(digits, end, value, 16).ptr != digits + 2) {
      throw std::runtime_error("data \"" + text + "\": two hexadecimal digits must follow each %");
    }
    bytes += static_cast<char>(value);
    i += 2;
  }
  return bytes;
}

Sources sources(const TrainingOptions& options) {
  Sources sources{.paths = {}, .field = options.field, .documents = options.documents};
  for (const std::string& text : options.data) sources.paths.push_back(path_from_text(text));
  return sources;
}

}  // namespace gateloop::training
