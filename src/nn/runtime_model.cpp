#include "gateloop/nn/runtime_model.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model/safetensors.h"
#include "ops/tensor_model.h"

namespace gateloop::nn {
namespace {

/// Tokens of all sequences that a prompt takes through the layers at once, which bounds its memory.
constexpr std::int64_t kTokensAtOnce = 8192;

/// In the memory of `model` where it is float32 there, at an address that a float may have.
torch::Tensor floats_of(const runtime::StoredWeight& weight, const runtime::Model& model) {
  const auto type = ops::scalar_type_of(weight.dtype);
  if (type == torch::kFloat32 &&
      reinterpret_cast<std::uintptr_t>(weight.data) % sizeof(float) == 0) {
    // from_blob takes memory to write to; nothing writes to parameters without gradients.
    return torch::from_blob(
        const_cast<void*>(weight.data), weight.shape, [model](void*) {}, type);
  }
  torch::Tensor values = torch::empty(weight.shape, type);
  std::memcpy(values.mutable_data_ptr(), weight.data, values.nbytes());
  return values.to(torch::kFloat32);
}

}  // namespace

runtime::Model runtime_model(const Transformer& transformer) {
  const auto parameters = transformer->named_parameters();
  std::vector<std::string> names;
  std::vector<torch::Tensor> tensors;
  for (const model::Weight& weight : model::weight_table(transformer->spec())) {
    names.push_back(weight.name);
    tensors.push_back(parameters[weight.name].detach().to(torch::kCPU));
  }
  return ops::model_of(transformer->spec(), names, tensors);
}

Transformer modules_of(const runtime::Model& saved) {
  if (!saved.options())
    throw std::invalid_argument("modules_of: model must be opened from a directory, not in memory");
  std::map<std::string, runtime::StoredWeight> stored;
  for (const auto& weight : saved.weights()) stored.emplace(weight.name, weight);
  Transformer transformer(*saved.options());
  for (auto& item : transformer->named_parameters()) {
    torch::Tensor values = floats_of(stored.at(item.key()), saved);
    const auto scales = stored.find(model::scale_name(item.key()));
    if (scales != stored.end()) values = values * floats_of(scales->second, saved).unsqueeze(1);
    item.value().requires_grad_(false);
    item.value().set_data(values);
  }
  transformer->eval();
  return transformer;
}

ModuleReader::ModuleReader(Transformer transformer) : transformer_(std::move(transformer)) {
  transformer_->eval();
}

torch::Tensor ModuleReader::on_device(std::span<const std::int64_t> ids, std::int64_t batch) const {
  return torch::tensor(at::ArrayRef<std::int64_t>(ids.data(), ids.size()), torch::kInt64)
      .view({batch, -1})
      .to(transformer_->parameters().front().device());
}

torch::Tensor ModuleReader::logits_after(const torch::Tensor& ids) {
  torch::Tensor logits = transformer_->forward(ids, &state_);
  batch_ = ids.size(0);
  position_ += ids.size(1);
  return logits;
}

std::span<const float> ModuleReader::prefill(std::span<const std::int64_t> ids,
                                             std::int64_t batch) {
  check_ids("prefill", ids, batch, batch_, spec().num_tokens);
  const torch::NoGradGuard no_grad;
  const torch::Tensor read = on_device(ids, batch);
  const std::int64_t most = std::max<std::int64_t>(1, kTokensAtOnce / batch);
  for (const torch::Tensor& part : read.split(most, 1)) last_logits_ = logits_after(part);
  last_logits_ = last_logits_.select(1, -1).to(torch::kCPU, torch::kFloat32).contiguous();
  return {last_logits_.const_data_ptr<float>(), static_cast<std::size_t>(last_logits_.numel())};
}

double ModuleReader::surprise(std::span<const std::int64_t> ids, std::span<const std::int64_t> next,
                              std::int64_t batch) {
  check_ids("surprise", ids, batch, batch_, spec().num_tokens);
  check_next(next, ids, spec().num_tokens);
  const torch::NoGradGuard no_grad;
  const torch::Tensor read = on_device(ids, batch), target = on_device(next, batch).flatten();
  const torch::Tensor logits = logits_after(read).flatten(0, 1).to(torch::kFloat32);
  return at::cross_entropy_loss(logits, target, {}, at::Reduction::Sum).item<double>();
}

const model::ModelSpec& ModuleReader::spec() const { return transformer_->spec(); }
void ModuleReader::restart() {
  state_.clear();
  batch_ = position_ = 0;
}
std::int64_t ModuleReader::position() const { return position_; }
std::int64_t ModuleReader::state_bytes() const {
  std::int64_t bytes = 0;
  for (const MixerState& layer : state_) bytes += layer.bytes();
  return bytes;
}

}  // namespace gateloop::nn
