#include "runtime/weight_set.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "model/digest.h"
#include "model/file.h"
#include "model/safetensors.h"

namespace gateloop::runtime {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const char* action) {
  throw std::runtime_error(path.string() + ": cannot " + action + ": " +
                           std::generic_category().message(errno));
}

bool is_aligned(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

std::size_t bytes_of(const StoredWeight& weight) {
  const std::int64_t count = std::accumulate(weight.shape.begin(), weight.shape.end(),
                                             std::int64_t{1}, std::multiplies<>());
  return static_cast<std::size_t>(count) * model::dtype_bytes(weight.dtype);
}

/// The bytes of a file, which lives as long as any copy of the pointer.
std::shared_ptr<const std::byte> map_file(const std::filesystem::path& path, std::size_t& size) {
  const model::FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status = {};
  if (fd.get() < 0 || ::fstat(fd.get(), &status) != 0) fail(path, "open");
  size = static_cast<std::size_t>(status.st_size);
  // Shared and populated: every weight is read with every token.
  void* const address = ::mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd.get(), 0);
  if (address == MAP_FAILED) fail(path, "map");
  return {static_cast<const std::byte*>(address),
          [address, size](const std::byte*) { ::munmap(address, size); }};
}

}  // namespace

WeightSet::WeightSet(const model::ModelFiles& files) : spec_(files.spec), options_(files.options) {
  std::size_t size = 0;
  const auto bytes = map_file(files.weights, size);
  for (const model::TensorEntry& entry : files.header.tensors) {
    // The file may have been replaced since its header was read.
    if (entry.end > size)
      throw std::runtime_error(files.weights.string() + ": changed while it was opened");
    weights_[entry.name] = {entry.name, entry.dtype, entry.shape, bytes.get() + entry.begin};
  }
  owner_ = bytes;
}

WeightSet::WeightSet(const model::ModelSpec& spec, const std::vector<StoredWeight>& weights,
                     std::shared_ptr<const void> owner)
    : spec_(spec), owner_(std::move(owner)) {
  model::check(spec);
  std::vector<model::TensorEntry> entries;
  for (const StoredWeight& weight : weights) {
    weights_[weight.name] = weight;
    entries.push_back({.name = weight.name, .dtype = weight.dtype, .shape = weight.shape});
  }
  if (const std::string problems = model::stored_problems(spec, entries); !problems.empty())
    throw std::invalid_argument("Model: " + problems);
}

std::vector<StoredWeight> WeightSet::weights() const {
  std::vector<StoredWeight> weights;
  for (const auto& [name, weight] : weights_) weights.push_back(weight);
  return weights;
}

StoredMatrix WeightSet::stored_matrix(const std::string& name) const {
  const StoredWeight& matrix = weight(name);
  const bool is_int8 = matrix.dtype == "I8";
  return {matrix.dtype, matrix.shape[0], matrix.shape[1],
          static_cast<const std::byte*>(matrix.data),
          is_int8 ? static_cast<const std::byte*>(weight(model::scale_name(name)).data) : nullptr};
}

recurrence::Matrix WeightSet::matrix(const std::string& name, Format format) {
  const StoredMatrix stored = stored_matrix(name);
  const recurrence::Storage storage = storage_of(format, stored.dtype);
  recurrence::Matrix matrix{.storage = storage, .rows = stored.rows, .columns = stored.columns};
  const bool in_place = stored.dtype == dtype_of(storage) &&
                        is_aligned(stored.data, recurrence::storage_bytes(storage)) &&
                        is_aligned(stored.scales, sizeof(float));
  if (in_place) {
    matrix.data = stored.data;
    matrix.scales = reinterpret_cast<const float*>(stored.scales);
    return matrix;
  }
  const Converted& copy = copies_.emplace_back(convert(stored, storage));
  copied_bytes_ += static_cast<std::int64_t>(copy.data.size() + 4 * copy.scales.size());
  matrix.data = copy.data.data();
  if (!copy.scales.empty()) matrix.scales = copy.scales.data();
  return matrix;
}

const float* WeightSet::vector(const std::string& name) {
  if (name.empty()) return nullptr;
  const StoredWeight& stored = weight(name);
  if (stored.dtype == "F32" && is_aligned(stored.data, sizeof(float)))
    return static_cast<const float*>(stored.data);
  Converted& copy = copies_.emplace_back();
  copy.scales.resize(static_cast<std::size_t>(stored.shape[0]));
  read_floats(stored.dtype, static_cast<const std::byte*>(stored.data), stored.shape[0],
              copy.scales.data());
  copied_bytes_ += 4 * stored.shape[0];
  return copy.scales.data();
}

std::uint64_t WeightSet::digest() const {
  model::Digest digest;
  digest.add(model::to_json(spec_));
  for (const auto& [name, weight] : weights_) {
    digest.add(name);
    digest.add(weight.data, std::min<std::size_t>(64, bytes_of(weight)));
  }
  return digest.value();
}

std::uint64_t WeightSet::full_digest() const {
  model::Digest digest;
  digest.add(model::to_json(spec_));
  for (const auto& [name, weight] : weights_) {
    digest.add(name + " " + weight.dtype);
    digest.add(weight.data, bytes_of(weight));
  }
  return digest.value();
}

}  // namespace gateloop::runtime
