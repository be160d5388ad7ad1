#include "ops/tensor_model.h"

#include <memory>
#include <utility>

#include "ops/checks.h"

namespace gateloop::ops {
namespace {

struct DTypeName {
  const char* name;
  at::ScalarType type;
};
constexpr DTypeName kDTypes[] = {{"F64", at::kDouble},
                                 {"F32", at::kFloat},
                                 {"BF16", at::kBFloat16},
                                 {"F16", at::kHalf},
                                 {"I8", at::kChar}};

std::string dtype_of(const std::string& name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  for (const DTypeName& known : kDTypes) {
    if (known.type == type && tensor.is_floating_point()) return known.name;
  }
  TORCH_CHECK_VALUE(false, "Session: ", name, " must be floating point, got ", type);
}

}  // namespace

at::ScalarType scalar_type_of(const std::string& dtype) {
  for (const DTypeName& known : kDTypes) {
    if (known.name == dtype) return known.type;
  }
  TORCH_CHECK_VALUE(false, "Model: no torch dtype for ", dtype);
}

runtime::Model model_of(const model::ModelSpec& spec, const std::vector<std::string>& names,
                        const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK_VALUE(names.size() == tensors.size(), "Session: expected a tensor for each of ",
                    names.size(), " names, got ", tensors.size());
  auto owner = std::make_shared<std::vector<at::Tensor>>();
  std::vector<runtime::StoredWeight> weights;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    TORCH_CHECK_VALUE(tensor.is_cpu(), "Session: ", names[i], " must be on the CPU, got ",
                      tensor.device());
    check_readable("Session", names[i].c_str(), tensor);
    owner->push_back(tensor.detach().resolve_neg().contiguous());
    weights.push_back({names[i], dtype_of(names[i], tensor), tensor.sizes().vec(),
                       owner->back().const_data_ptr()});
  }
  return {spec, weights, std::move(owner)};
}

}  // namespace gateloop::ops
