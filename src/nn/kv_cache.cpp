#include "nn/kv_cache.h"

#include <algorithm>

namespace gateloop::nn {
namespace {

/// Whether nothing else reads this memory: no copy of the state, no graph of an earlier call.
bool has_one_owner(const torch::Tensor& t) {
  return t.use_count() == 1 && t.storage().use_count() == 1;
}

/// Outside of inference mode a write to a tensor made inside is an error in torch.
bool is_writable(const torch::Tensor& t) {
  return !t.is_inference() || c10::InferenceMode::is_enabled();
}

void check_fits(const torch::Tensor& cache, std::int64_t position, const torch::Tensor& fresh) {
  if (cache.defined()) {
    TORCH_CHECK(cache.size(0) == fresh.size(0) && cache.size(1) == fresh.size(1) &&
                    cache.size(3) == fresh.size(3) && cache.size(2) >= position,
                "CausalFullAttention: state holds keys of shape ", cache.sizes(), " at position ",
                position, ", x makes keys of shape ", fresh.sizes());
  } else {
    TORCH_CHECK(position == 0, "CausalFullAttention: state is at position ", position,
                " but holds no keys");
  }
}

/// A copy of the first `position` entries, with room for `length`.
torch::Tensor grown(const torch::Tensor& cache, std::int64_t position, std::int64_t length,
                    const torch::TensorOptions& options) {
  const auto before = cache.defined() ? cache.size(2) : 0;
  const auto capacity = length <= before ? before : std::max(length, 2 * before);
  auto sizes = cache.sizes().vec();
  sizes[2] = capacity;
  auto copy = at::empty(sizes, options);
  copy.narrow(2, 0, position).copy_(cache.narrow(2, 0, position));
  return copy;
}

}  // namespace

torch::Tensor append(torch::Tensor& cache, std::int64_t position, const torch::Tensor& fresh) {
  check_fits(cache, position, fresh);
  const auto time = fresh.size(2), length = position + time;
  {
    const torch::NoGradGuard no_grad;
    if (!cache.defined()) cache = at::empty(fresh.sizes(), fresh.options());
    // Under autocast that begins or ends on the way, the entries keep the wider dtype.
    const auto options =
        fresh.options().dtype(at::promote_types(cache.scalar_type(), fresh.scalar_type()));
    const bool in_place = has_one_owner(cache) && is_writable(cache) && length <= cache.size(2) &&
                          cache.scalar_type() == options.dtype() &&
                          cache.device() == options.device();
    if (!in_place) cache = grown(cache, position, length, options);
    cache.narrow(2, position, time).copy_(fresh);
  }
  if (position == 0) return fresh;
  if (fresh.requires_grad()) {
    return at::cat({cache.narrow(2, 0, position).to(fresh.scalar_type()), fresh}, 2);
  }
  return cache.narrow(2, 0, length).to(fresh.scalar_type());
}

std::int64_t check_window(const torch::Tensor& cache, std::int64_t position,
                          const torch::Tensor& fresh, std::int64_t window) {
  const auto kept = std::min(position, window - 1);
  TORCH_CHECK(kept == 0 || (cache.defined() && cache.dim() == 4 && cache.size(2) == kept &&
                            cache.size(0) == fresh.size(0) && cache.size(1) == fresh.size(1) &&
                            cache.size(3) == fresh.size(3)),
              "CausalFullAttention: state must hold ", kept, " keys of ", fresh.size(0),
              " sequences at position ", position, " in a window of ", window, ", got ",
              cache.defined() ? c10::str(cache.sizes()) : "nothing");
  return kept;
}

torch::Tensor append_to_window(torch::Tensor& cache, std::int64_t position,
                               const torch::Tensor& fresh, std::int64_t window) {
  const auto kept = check_window(cache, position, fresh, window);
  auto all = kept == 0 ? fresh : at::cat({cache.to(fresh.scalar_type()), fresh}, 2);
  const auto next = std::min(all.size(2), window - 1);
  cache = all.narrow(2, all.size(2) - next, next).detach().clone();
  return all;
}

}  // namespace gateloop::nn
