// The safetensors format (https://github.com/huggingface/safetensors): an unsigned 64-bit
// little-endian header length, a JSON header {"name": {"dtype", "shape", "data_offsets"}, ...,
// "__metadata__": {...}}, then the tensors' bytes, without holes, in the order of their offsets.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/file.h"
#include "checkpoint/parse_json.h"
#include "gateloop/checkpoint.h"

namespace gateloop::checkpoint {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

using nlohmann::json;

constexpr const char* kMetadata = "__metadata__";
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's bound

struct DTypeName {
  std::string_view name;
  torch::ScalarType type;
};
constexpr DTypeName kDTypes[] = {
    {"F64", torch::kFloat64},   {"F32", torch::kFloat32}, {"F16", torch::kFloat16},
    {"BF16", torch::kBFloat16}, {"I64", torch::kInt64},   {"I32", torch::kInt32},
    {"I16", torch::kInt16},     {"I8", torch::kInt8},     {"U8", torch::kUInt8},
    {"BOOL", torch::kBool},
};

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& problem) {
  throw std::runtime_error(path.string() + ": not a valid safetensors file: " + problem);
}

/// One tensor's place in the file: bytes [begin, end) of the data that follow the header.
struct Entry {
  std::string name;
  torch::ScalarType type{};
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// nlohmann-json keeps the last of two equal keys; two tensors of one name are an error here.
json parse_header(const std::filesystem::path& path, const std::string& text) {
  std::set<std::string> names;
  const auto reject_duplicates = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth >= kMaxJsonDepth) fail(path, "the header nests too deeply");
    if (depth == 1 && event == json::parse_event_t::key &&
        !names.insert(parsed.get<std::string>()).second) {
      fail(path, "two tensors are named \"" + parsed.get<std::string>() + "\"");
    }
    return true;
  };
  try {
    json header = json::parse(text, reject_duplicates);
    if (!header.is_object()) fail(path, "the header is not a JSON object");
    return header;
  } catch (const json::exception& error) {
    fail(path, std::string("bad JSON in the header: ") + error.what());
  }
}

std::uint64_t unsigned_of(const std::filesystem::path& path, const std::string& where,
                          const json& value) {
  // Below 2^63, so that it is also a valid int64 dimension.
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >> 63 != 0) {
    fail(path, where + " holds " + value.dump() + ", not a non-negative integer");
  }
  return value.get<std::uint64_t>();
}

Entry parse_entry(const std::filesystem::path& path, const std::string& name, const json& value,
                  std::uint64_t data_bytes) {
  const std::string where = "tensor \"" + name + "\"";
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.is_object() || !value.contains(key)) {
      fail(path, where + " has no \"" + std::string(key) + "\"");
    }
  }
  Entry entry;
  entry.name = name;
  const json& dtype = value["dtype"];
  const auto known = std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](const DTypeName& d) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == d.name;
  });
  if (known == std::end(kDTypes)) fail(path, where + " has the unknown dtype " + dtype.dump());
  entry.type = known->type;

  const json& shape = value["shape"];
  if (!shape.is_array()) fail(path, where + ": \"shape\" is not an array");
  std::uint64_t bytes = c10::elementSize(entry.type);
  for (const json& size : shape) {
    const std::uint64_t extent = unsigned_of(path, where + ": \"shape\"", size);
    entry.shape.push_back(static_cast<std::int64_t>(extent));
    if (__builtin_mul_overflow(bytes, extent, &bytes)) fail(path, where + ": its size overflows");
  }

  const json& offsets = value["data_offsets"];
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
void check_layout(const std::filesystem::path& path, std::vector<Entry> entries,
                  std::uint64_t data_bytes) {
  std::sort(entries.begin(), entries.end(), [](const Entry& left, const Entry& right) {
    return std::pair(left.begin, left.end) < std::pair(right.begin, right.end);
  });
  std::uint64_t position = 0;
  for (const Entry& entry : entries) {
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

std::string_view dtype_name(const std::filesystem::path& path, const std::string& name,
                            torch::ScalarType type) {
  for (const DTypeName& known : kDTypes) {
    if (known.type == type) return known.name;
  }
  throw std::runtime_error(path.string() + ": cannot save tensor \"" + name +
                           "\": safetensors has no " + std::string(c10::toString(type)) +
                           (c10::isComplexType(type) ? " (save torch::view_as_real of it)" : ""));
}

}  // namespace

SafeTensors load_safetensors(const std::filesystem::path& path) {
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

  SafeTensors content;
  std::vector<Entry> entries;
  const json header = parse_header(path, text);
  for (const auto& [name, value] : header.items()) {
    if (name != kMetadata) {
      entries.push_back(parse_entry(path, name, value, data_bytes));
      continue;
    }
    if (!value.is_object()) fail(path, "\"__metadata__\" is not an object");
    for (const auto& [key, text_value] : value.items()) {
      if (!text_value.is_string()) fail(path, "metadata \"" + key + "\" is not a string");
      content.metadata[key] = text_value.get<std::string>();
    }
  }
  check_layout(path, entries, data_bytes);
  for (const Entry& entry : entries) {
    torch::Tensor tensor = torch::empty(entry.shape, entry.type);
    file.read(tensor.data_ptr(), tensor.nbytes(), data_begin + entry.begin);
    content.tensors.emplace(entry.name, std::move(tensor));
  }
  return content;
}

void save_safetensors(const std::filesystem::path& path, const SafeTensors& content) {
  struct Item {
    std::string name;
    std::string_view dtype;
    torch::Tensor tensor;  // contiguous, on the CPU
  };
  std::vector<Item> items;
  for (const auto& [name, tensor] : content.tensors) {
    if (!tensor.defined()) {
      throw std::runtime_error(path.string() + ": cannot save tensor \"" + name + "\": undefined");
    }
    items.push_back({name, dtype_name(path, name, tensor.scalar_type()),
                     tensor.detach().to(torch::kCPU).resolve_neg().contiguous()});
  }
  // Widest elements first: every tensor is then aligned to its element size.
  std::stable_sort(items.begin(), items.end(), [](const Item& left, const Item& right) {
    return left.tensor.element_size() > right.tensor.element_size();
  });

  json header = json::object();
  if (!content.metadata.empty()) header[kMetadata] = content.metadata;
  std::uint64_t position = 0;
  for (const Item& item : items) {
    const std::uint64_t end = position + item.tensor.nbytes();
    header[item.name] = {{"dtype", item.dtype},
                         {"shape", item.tensor.sizes().vec()},
                         {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception& error) {
    throw std::runtime_error(path.string() +
                             ": a tensor name or metadata value is not UTF-8: " + error.what());
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data begin on an 8-byte boundary
  const std::uint64_t header_bytes = text.size();

  AtomicFile file(path);
  file.write(&header_bytes, sizeof header_bytes);
  file.write(text);
  for (const Item& item : items) file.write(item.tensor.const_data_ptr(), item.tensor.nbytes());
  file.commit();
}

}  // namespace gateloop::checkpoint
