#include "nn/recompute.h"

#include <torch/csrc/autograd/engine.h>

#include <utility>

#include "nn/autocast.h"

namespace gateloop::nn {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What the backward pass needs beside the inputs.
struct Rerun : torch::CustomClassHolder {
  TensorFunction run;
  at::DeviceType device = at::kCPU;
  at::ScalarType autocast = at::kFloat;
};

constexpr const char* kRerun = "rerun";

class RecomputedBackward : public torch::autograd::Function<RecomputedBackward> {
 public:
  /// `anchor` requires a gradient: inputs need none where only parameters are trained.
  static variable_list forward(AutogradContext* ctx, const c10::intrusive_ptr<Rerun>& rerun,
                               at::TensorList inputs, const Tensor& /*anchor*/) {
    ctx->save_for_backward(inputs.vec());
    ctx->saved_data[kRerun] = c10::IValue::make_capsule(rerun);
    return rerun->run(inputs.vec());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::GradMode::is_enabled(),
                                "Transformer: checkpoint_blocks has no second derivatives");
    TORCH_CHECK_NOT_IMPLEMENTED(
        torch::autograd::Engine::get_default_engine().is_checkpoint_valid(),
        "Transformer: checkpoint_blocks needs backward() without inputs, got autograd::grad()");
    const auto rerun =
        c10::static_intrusive_pointer_cast<Rerun>(ctx->saved_data[kRerun].toCapsule());
    variable_list inputs;
    for (const Tensor& input : ctx->get_saved_variables()) {
      inputs.push_back(input.detach().requires_grad_(input.requires_grad()));
    }
    variable_list outputs, ends, end_gradients;
    {
      const at::AutoGradMode with_gradients(true);
      const Autocast autocast(rerun->device, rerun->autocast);
      outputs = rerun->run(inputs);
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (!gradients[i].defined() || !outputs[i].requires_grad()) continue;
      ends.push_back(outputs[i]);
      end_gradients.push_back(gradients[i]);
    }
    if (!ends.empty()) torch::autograd::backward(ends, end_gradients);
    variable_list results(1 + inputs.size() + 1);  // of `rerun` and `anchor`: none
    for (std::size_t i = 0; i < inputs.size(); ++i) results[1 + i] = inputs[i].grad();
    return results;
  }
};

}  // namespace

variable_list recomputed_backward(TensorFunction run, const variable_list& inputs) {
  auto rerun = c10::make_intrusive<Rerun>();
  rerun->run = std::move(run);
  rerun->device = inputs.front().device().type();
  if (at::autocast::is_autocast_enabled(rerun->device)) {
    rerun->autocast = at::autocast::get_autocast_dtype(rerun->device);
  }
  const Tensor anchor = torch::empty({0}, torch::requires_grad());
  return RecomputedBackward::apply(rerun, at::TensorList(inputs), anchor);
}

}  // namespace gateloop::nn
