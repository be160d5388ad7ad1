#include "ops/define.h"

#include <ATen/core/stack.h>

#include <string>

namespace gateloop::ops {
namespace {

bool is_dense_cpu(const at::Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested();
}

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& declared = op.schema().arguments();
  const auto given = torch::jit::last(*stack, declared.size());
  for (std::size_t i = 0; i < declared.size(); ++i) {
    if (!given[i].isTensor()) continue;
    const at::Tensor& t = given[i].toTensor();
    TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || is_dense_cpu(t), op.schema().name(), ": ",
                                declared[i].name(), " must be a dense tensor on the CPU, got ",
                                t.toString(), " on ", t.device());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": tensors must be dense and on the CPU, got ",
                              keys.highestPriorityTypeId());
}

}  // namespace

void define(torch::Library& m, const char* schema) {
  const std::string text = schema;
  m.def(schema, {at::Tag::pt2_compliant_tag});
  m.impl(text.substr(0, text.find('(')).c_str(),
         torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd,
                         torch::CppFunction::makeFromBoxedFunction<&refuse>()));
}

}  // namespace gateloop::ops
