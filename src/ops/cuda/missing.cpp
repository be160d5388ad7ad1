/// CUDA kernels are not part of this build: say so instead of the dispatcher's list of backends.
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace {

void built_without_cuda(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": gateloop was built without CUDA; move the tensors to the CPU");
}

}  // namespace

TORCH_LIBRARY_IMPL(gateloop, CUDA, m) {
  for (const char* op : {"linear_recurrence", "gate_loop", "simple_gate_loop"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&built_without_cuda>());
  }
}
