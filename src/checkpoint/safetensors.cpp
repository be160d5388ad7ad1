// torch's side of the safetensors format.
#include "model/safetensors.h"

#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "gateloop/checkpoint.h"
#include "model/file.h"

namespace gateloop::checkpoint {
namespace {

struct DTypeName {
  std::string_view name;
  torch::ScalarType type;
};
constexpr DTypeName kDTypes[] = {
    {"F64", torch::kFloat64},
    {"F32", torch::kFloat32},
    {"F16", torch::kFloat16},
    {"BF16", torch::kBFloat16},
    {"I64", torch::kInt64},
    {"I32", torch::kInt32},
    {"I16", torch::kInt16},
    {"I8", torch::kInt8},
    {"U8", torch::kUInt8},
    {"U64", torch::kUInt64},
    {"U32", torch::kUInt32},
    {"U16", torch::kUInt16},
    {"BOOL", torch::kBool},
    {"C64", torch::kComplexFloat},
    {"F8_E4M3", torch::kFloat8_e4m3fn},
    {"F8_E4M3FNUZ", torch::kFloat8_e4m3fnuz},
    {"F8_E5M2", torch::kFloat8_e5m2},
    {"F8_E5M2FNUZ", torch::kFloat8_e5m2fnuz},
    {"F8_E8M0", torch::kFloat8_e8m0fnu},
};

torch::ScalarType type_of(std::string_view dtype) {
  for (const DTypeName& known : kDTypes) {
    if (known.name == dtype) return known.type;
  }
  throw std::logic_error("no torch dtype for " + std::string(dtype));
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
  model::SafeTensorsHeader header = model::read_safetensors_header(path);
  const model::InputFile file(path);
  SafeTensors content{.tensors = {}, .metadata = std::move(header.metadata)};
  for (const model::TensorEntry& entry : header.tensors) {
    torch::Tensor tensor = torch::empty(entry.shape, type_of(entry.dtype));
    file.read(tensor.data_ptr(), tensor.nbytes(), entry.begin);
    content.tensors.emplace(entry.name, std::move(tensor));
  }
  return content;
}

void save_safetensors(const std::filesystem::path& path, const SafeTensors& content) {
  std::vector<torch::Tensor> kept;  // contiguous, on the CPU
  std::vector<model::TensorBytes> tensors;
  for (const auto& [name, tensor] : content.tensors) {
    if (!tensor.defined()) {
      throw std::runtime_error(path.string() + ": cannot save tensor \"" + name + "\": undefined");
    }
    const auto dtype = dtype_name(path, name, tensor.scalar_type());
    kept.push_back(tensor.detach().to(torch::kCPU).resolve_neg().contiguous());
    tensors.push_back({.name = name,
                       .dtype = std::string(dtype),
                       .shape = tensor.sizes().vec(),
                       .data = kept.back().const_data_ptr()});
  }
  model::write_safetensors(path, std::move(tensors), content.metadata);
}

}  // namespace gateloop::checkpoint
