#pragma once

/// The safetensors format (https://github.com/huggingface/safetensors): an unsigned 64-bit
/// little-endian header length, a JSON header {"name": {"dtype", "shape", "data_offsets"}, ...,
/// "__metadata__": {...}}, then the tensors' bytes, without holes, in the order of their offsets.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "gateloop/model.h"

namespace gateloop::model {

/// A tensor's place in a file.
struct TensorEntry {
  std::string name;
  std::string dtype;  ///< as the format writes it: "F32", "BF16", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  ///< of its bytes, from the start of the file
  std::uint64_t end = 0;
};

struct SafeTensorsHeader {
  std::vector<TensorEntry> tensors;  ///< by name
  std::map<std::string, std::string> metadata;
};

/// Bytes of one element; 0 for a dtype that the format does not have.
std::size_t dtype_bytes(std::string_view dtype);

/// Throws std::runtime_error naming the path and what is wrong (missing, truncated, bad header,
/// unknown dtype, overlapping offsets, ...).
SafeTensorsHeader read_safetensors_header(const std::filesystem::path& path);

/// The scales (rows), float32, of a matrix NAME (rows, columns) of int8 are stored as NAME.scale.
std::string scale_name(const std::string& matrix);
/// What keeps stored tensors from being the weights of this model: their names, shapes and dtypes,
/// and those of the scales of int8 matrices. "" where nothing does.
std::string stored_problems(const ModelSpec& spec, const std::vector<TensorEntry>& tensors);

/// A tensor to write: contiguous, little-endian.
struct TensorBytes {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;
};
/// Throws std::runtime_error naming the path; the file that was there before stays intact.
void write_safetensors(const std::filesystem::path& path, std::vector<TensorBytes> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace gateloop::model
