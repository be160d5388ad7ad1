#include "training/memory.h"

#include <algorithm>

namespace gateloop::training {

std::int64_t activation_bytes_per_row(const nn::TransformerOptions& model, std::int64_t length) {
  const std::int64_t dim = model.dim;
  std::int64_t mixer = 0;  // floats per time step
  if (model.use_gate_looped_attn) {
    const std::int64_t inner = model.dim_gate_looped_attn.value_or(dim);
    const std::int64_t heads = model.gate_loop_heads.value_or(inner);
    const std::int64_t head_dim = inner / std::max<std::int64_t>(heads, 1);
    // q, k, v; z as (re, im); y; the swish gate before and after; their product.
    mixer = 9 * inner;
    // Complex d x d states per head, and the k v products they sum.
    if (head_dim > 1) mixer += 4 * inner * head_dim;
  } else {
    const std::int64_t inner = model.heads * model.dim_head;
    // q, k, v with and without rotation, transitions, gates; (T) scores before and after softmax.
    mixer = 12 * inner + 3 * model.heads * length;
  }
  // Residual stream and norms, the hidden layer before and after its activation.
  const std::int64_t block = mixer + 6 * dim + 3 * model.ff_mult * dim;
  // Logits, their softmax, their gradient.
  const std::int64_t per_step = model.depth * block + 3 * model.num_tokens;
  constexpr std::int64_t kBytes = 4;     // float32; autocast keeps some twice, at 2 bytes
  constexpr std::int64_t kBackward = 2;  // gradients in flight, allocator slack
  return per_step * length * kBytes * kBackward;
}

std::int64_t choose_rows_per_pass(const RunConfig& config, std::int64_t available) {
  const TrainingOptions& training = config.training;
  const std::int64_t rows = training.batch * training.accumulation;
  const std::int64_t bytes = rows * activation_bytes_per_row(config.model, training.length);
  return bytes <= available / 2 ? rows : training.batch;
}

}  // namespace gateloop::training
