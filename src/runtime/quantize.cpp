#include <stdexcept>
#include <vector>

#include "model/file.h"
#include "runtime/weight_set.h"

namespace gateloop::runtime {
namespace {

/// The tensors of one file in another format; the metadata stay.
void convert_file(const std::filesystem::path& from, const std::filesystem::path& to,
                  model::Weights weights, Format format) {
  const model::ModelFiles files = model::open_model(from, weights);
  const WeightSet source(files);
  std::vector<Converted> copies;
  std::vector<model::TensorBytes> tensors;
  for (const model::Weight& weight : model::weight_table(files.spec)) {
    Converted& copy = copies.emplace_back();
    if (weight.shape.size() == 2) {
      const StoredMatrix stored = source.stored_matrix(weight.name);
      const recurrence::Storage storage = storage_of(format, stored.dtype);
      copy = convert(stored, storage);
      tensors.push_back({weight.name, dtype_of(storage), weight.shape, copy.data.data()});
      if (storage == recurrence::Storage::kInt8)
        tensors.push_back(
            {model::scale_name(weight.name), "F32", {weight.shape[0]}, copy.scales.data()});
    } else {
      copy.scales.resize(static_cast<std::size_t>(weight.numel()));
      const StoredWeight& stored = source.weight(weight.name);
      read_floats(stored.dtype, static_cast<const std::byte*>(stored.data), weight.numel(),
                  copy.scales.data());
      tensors.push_back({weight.name, "F32", weight.shape, copy.scales.data()});
    }
  }
  model::write_safetensors(to / files.weights.filename(), std::move(tensors),
                           files.header.metadata);
}

}  // namespace

void quantize(const std::filesystem::path& from, const std::filesystem::path& to, Format format) {
  if (format > Format::kInt8) throw std::invalid_argument("quantize: no such format");
  std::filesystem::create_directories(to);
  if (std::filesystem::equivalent(from, to))
    throw std::invalid_argument("quantize: the models must go to another directory than " +
                                from.string());
  const std::string config = model::read_text(from / "config.json");
  convert_file(from, to, model::Weights::kLatest, format);
  if (std::filesystem::exists(from / "model.best.safetensors")) {
    convert_file(from, to, model::Weights::kBest, format);
  } else {
    std::filesystem::remove(to / "model.best.safetensors");  // of another model
  }
  model::save_text(to / "config.json", config);
}

}  // namespace gateloop::runtime
