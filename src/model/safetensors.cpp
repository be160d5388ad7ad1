#include "model/safetensors.h"

#include <algorithm>
#include <bit>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <stdexcept>
#include <utility>

#include "model/file.h"
#include "model/parse_json.h"

namespace gateloop::model {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr const char* kMetadata = "__metadata__";
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's bound

struct DType {
  std::string_view name;
  std::size_t bytes;
};
constexpr DType kDTypes[] = {{"F64", 8},     {"F32", 4},         {"F16", 2},     {"BF16", 2},
                             {"I64", 8},     {"I32", 4},         {"I16", 2},     {"I8", 1},
                             {"U64", 8},     {"U32", 4},         {"U16", 2},     {"U8", 1},
                             {"BOOL", 1},    {"C64", 8},         {"F8_E4M3", 1}, {"F8_E4M3FNUZ", 1},
                             {"F8_E5M2", 1}, {"F8_E5M2FNUZ", 1}, {"F8_E8M0", 1}};

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& problem) {
  throw std::runtime_error(path.string() + ": not a valid safetensors file: " + problem);
}

/// nlohmann-json keeps the last of two equal keys; two tensors of one name are an error here.
nlohmann::json parse_header(const std::filesystem::path& path, const std::string& text) {
  std::set<std::string> names;
  const auto reject_duplicates = [&](int depth, nlohmann::json::parse_event_t event,
                                     nlohmann::json& parsed) {
    if (depth >= kMaxJsonDepth) fail(path, "the header nests too deeply");
    if (depth == 1 && event == nlohmann::json::parse_event_t::key &&
        !names.insert(parsed.get<std::string>()).second) {
      fail(path, "two tensors are named \"" + parsed.get<std::string>() + "\"");
    }
    return true;
  };
  try {
    nlohmann::json header = nlohmann::json::parse(text, reject_duplicates);
    if (!header.is_object()) fail(path, "the header is not a JSON object");
    return header;
  } catch (const nlohmann::json::exception& error) {
    fail(path, std::string("bad JSON in the header: ") + error.what());
  }
}

std::uint64_t unsigned_of(const std::filesystem::path& path, const std::string& where,
                          const nlohmann::json& value) {
  // Below 2^63, so that it is also a valid int64 dimension.
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >> 63 != 0) {
    fail(path, where + " holds " + value.dump() + ", not a non-negative integer");
  }
  return value.get<std::uint64_t>();
}

/// Offsets of the data that follow the header.
TensorEntry parse_entry(const std::filesystem::path& path, const std::string& name,
                        const nlohmann::json& value, std::uint64_t data_bytes) {
  const std::string where = "tensor \"" + name + "\"";
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.is_object() || !value.contains(key)) {
      fail(path, where + " has no \"" + std::string(key) + "\"");
    }
  }
  TensorEntry entry;
  entry.name = name;
  const nlohmann::json& dtype = value["dtype"];
  if (dtype.is_string()) entry.dtype = dtype.get<std::string>();
  const std::size_t element = dtype_bytes(entry.dtype);
  if (element == 0) fail(path, where + " has the unknown dtype " + dtype.dump());

  const nlohmann::json& shape = value["shape"];
  if (!shape.is_array()) fail(path, where + ": \"shape\" is not an array");
  std::uint64_t bytes = element;
  for (const nlohmann::json& size : shape) {
    const std::uint64_t extent = unsigned_of(path, where + ": \"shape\"", size);
    entry.shape.push_back(static_cast<std::int64_t>(extent));
    if (__builtin_mul_overflow(bytes, extent, &bytes)) fail(path, where + ": its size overflows");
  }

  const nlohmann::json& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) {
    fail(path, where + ": \"data_offsets\" is not a pair");
  }
  entry.begin = unsigned_of(path, where + ": \"data_offsets\"", offsets[0]);
  entry.end = unsigned_of(path, where + ": \"data_offsets\"", offsets[1]);
  if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
    fail(path, where + ": its offsets span " + std::to_string(entry.end - entry.begin) +
                   " bytes, its shape and dtype need " + std::to_string(bytes));
  }
  if (entry.end > data_bytes) {
    fail(path, "truncated: " + where + " ends at byte " + std::to_string(entry.end) +
                   " of the data, the file holds " + std::to_string(data_bytes));
  }
  return entry;
}

/// The entries follow one another without overlap or hole, to the end of the file.
void check_layout(const std::filesystem::path& path, std::vector<TensorEntry> entries,
                  std::uint64_t data_bytes) {
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& left, const TensorEntry& right) {
    return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
  });
  std::uint64_t position = 0;
  for (const TensorEntry& entry : entries) {
    if (entry.begin != position) {
      fail(path, "tensor \"" + entry.name + "\" begins at byte " + std::to_string(entry.begin) +
                     " of the data where the one before it ends at " + std::to_string(position) +
                     (entry.begin < position ? ": they overlap" : ": a hole"));
    }
    position = entry.end;
  }
  if (position != data_bytes) {
    fail(path, std::to_string(data_bytes - position) + " bytes follow the last tensor");
  }
}

}  // namespace

std::size_t dtype_bytes(std::string_view dtype) {
  for (const DType& known : kDTypes) {
    if (known.name == dtype) return known.bytes;
  }
  return 0;
}

SafeTensorsHeader read_safetensors_header(const std::filesystem::path& path) {
  const InputFile file(path);
  std::uint64_t header_bytes = 0;
  if (file.size() < sizeof header_bytes) fail(path, "truncated: shorter than its header length");
  file.read(&header_bytes, sizeof header_bytes, 0);
  const std::uint64_t after_length = file.size() - sizeof header_bytes;
  if (header_bytes > kMaxHeaderBytes || header_bytes > after_length) {
    fail(path, "its header claims " + std::to_string(header_bytes) + " bytes, the file holds " +
                   std::to_string(after_length));
  }
  std::string text(header_bytes, '\0');
  file.read(text.data(), text.size(), sizeof header_bytes);
  const std::uint64_t data_begin = sizeof header_bytes + header_bytes;
  const std::uint64_t data_bytes = file.size() - data_begin;

  SafeTensorsHeader content;
  const nlohmann::json header = parse_header(path, text);
  for (const auto& [name, value] : header.items()) {
    if (name != kMetadata) {
      content.tensors.push_back(parse_entry(path, name, value, data_bytes));
      continue;
    }
    if (!value.is_object()) fail(path, "\"__metadata__\" is not an object");
    for (const auto& [key, text_value] : value.items()) {
      if (!text_value.is_string()) fail(path, "metadata \"" + key + "\" is not a string");
      content.metadata[key] = text_value.get<std::string>();
    }
  }
  check_layout(path, content.tensors, data_bytes);
  for (TensorEntry& entry : content.tensors) {
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  return content;
}

void write_safetensors(const std::filesystem::path& path, std::vector<TensorBytes> tensors,
                       const std::map<std::string, std::string>& metadata) {
  // Widest elements first: every tensor is then aligned to its element size.
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& left, const auto& right) {
    return dtype_bytes(left.dtype) > dtype_bytes(right.dtype);
  });
  const auto bytes_of = [](const TensorBytes& tensor) {
    return std::accumulate(tensor.shape.begin(), tensor.shape.end(),
                           static_cast<std::uint64_t>(dtype_bytes(tensor.dtype)),
                           [](std::uint64_t product, std::int64_t size) {
                             return product * static_cast<std::uint64_t>(size);
                           });
  };
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  std::uint64_t position = 0;
  for (const TensorBytes& tensor : tensors) {
    const std::uint64_t end = position + bytes_of(tensor);
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(path.string() +
                             ": a tensor name or metadata value is not UTF-8: " + error.what());
  }
  // The data begin on a cache line, so that a mapped file is read by whole ones.
  constexpr std::size_t kLine = 64;
  text.resize((text.size() + 8 + kLine - 1) / kLine * kLine - 8, ' ');
  const std::uint64_t header_bytes = text.size();

  AtomicFile file(path);
  file.write(&header_bytes, sizeof header_bytes);
  file.write(text);
  for (const TensorBytes& tensor : tensors) file.write(tensor.data, bytes_of(tensor));
  file.commit();
}

}  // namespace gateloop::model
