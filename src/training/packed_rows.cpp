#include "training/packed_rows.h"

#include <algorithm>
#include <variant>
#include <vector>

namespace gateloop::training {
namespace {

/// Whether a layer attends to all of a row of `length` steps.
bool attends_to_rows(const model::ModelSpec& spec, std::int64_t length) {
  return std::ranges::any_of(spec.layers, [length](const model::LayerSpec& layer) {
    const auto* attention = std::get_if<model::AttentionSpec>(&layer.mixer);
    return attention != nullptr && attention->window.value_or(length) >= length;
  });
}

/// ids (B, T) -> (B T, num_tokens).
torch::Tensor logits_of(nn::Transformer& model, const torch::Tensor& ids, Separator separator) {
  if (!separator) return model->forward(ids).flatten(0, 1);
  // Such a layer computes a score for each pair of steps of what is packed: one row at a time.
  if (ids.size(0) > 1 && attends_to_rows(model->spec(), ids.size(1))) {
    std::vector<torch::Tensor> rows;
    for (const torch::Tensor& row : ids.split(1)) rows.push_back(logits_of(model, row, separator));
    return torch::cat(rows);
  }
  const PackedRows rows = pack_rows(ids, *separator);
  return model->forward(rows.ids, nullptr, std::nullopt, rows.packing).flatten(0, 1);
}

}  // namespace

PackedRows pack_rows(const torch::Tensor& ids, std::uint8_t separator) {
  torch::Tensor starts = ids.eq(separator);  // (B, T)
  starts.select(1, 0).fill_(true);
  const torch::Tensor end = torch::full({1}, ids.numel(), ids.options());
  const torch::Tensor cuts = torch::cat({starts.flatten().nonzero().flatten(), end});
  return {ids.reshape({1, -1}), {.cu_seqlens = cuts}};
}

torch::Tensor next_byte_loss(nn::Transformer& model, const torch::Tensor& ids, Separator separator,
                             at::Reduction::Reduction reduction) {
  const std::int64_t length = ids.size(1) - 1;
  torch::Tensor logits = logits_of(model, ids.narrow(1, 0, length), separator);
  if (at::isReducedFloatingType(logits.scalar_type())) logits = logits.to(torch::kFloat32);
  return at::cross_entropy_loss(logits, ids.narrow(1, 1, length).flatten(), {}, reduction);
}

}  // namespace gateloop::training
