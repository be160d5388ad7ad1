#include "gateloop/nn/simple_gate_loop_layer.h"

#include "nn/common.h"
#include "nn/packing.h"
#include "nn/scans.h"

namespace gateloop::nn {

using torch::Tensor;

namespace {

constexpr auto kSimpleGateLoopLayer = "SimpleGateLoopLayer";

void check_cache(const char* field, const Tensor& t, std::int64_t rows) {
  TORCH_CHECK(t.defined() && t.dim() == 2 && t.size(0) == rows && t.size(1) == 1,
              kSimpleGateLoopLayer, ": cache.", field, " must be (B * dim, 1) = (", rows,
              ", 1), got ", t.defined() ? c10::str(t.sizes()) : "nothing");
}

}  // namespace

SimpleGateLoopLayerImpl::SimpleGateLoopLayerImpl(std::int64_t dim,
                                                 SimpleGateLoopLayerOptions options)
    : dim_(dim), options_(options) {
  check_positive(kSimpleGateLoopLayer, "dim", dim);
  if (options.prenorm) norm_ = register_module("norm", RMSNorm(dim));
  to_qkva_ = register_nested(*this, "to_qkva", "0", linear(dim, 3 * dim, false));
  if (options.post_ln) {
    post_ln_ =
        register_module("maybe_post_ln", torch::nn::LayerNorm(torch::nn::LayerNormOptions({dim})));
  }
}

Tensor SimpleGateLoopLayerImpl::forward(const Tensor& x) { return forward_packed(x, {}); }

Tensor SimpleGateLoopLayerImpl::forward_packed(const Tensor& x, const Packing& packing) {
  check_sequence(kSimpleGateLoopLayer, x, dim_);
  return forward_normalised(normalised(x), nullptr, packing);
}

SimpleGateLoopLayerImpl::Steps SimpleGateLoopLayerImpl::run(
    const Tensor& x, const std::optional<Tensor>& initial_state, const Packing& packing) {
  const auto qkva = to_qkva_(x).chunk(3, -1);
  auto [y, final_state] =
      Scans(packing, initial_state, options_.reverse)
          .simple_gate_loop(qkva[0], qkva[1], qkva[2], /*normalize_input=*/false);
  return {post_ln_ ? post_ln_(y) : y, qkva[2], final_state};
}

Tensor SimpleGateLoopLayerImpl::advance(const Tensor& x, Tensor& state, const Packing& packing) {
  check_sequence(kSimpleGateLoopLayer, x, dim_);
  return forward_normalised(normalised(x), &state, packing);
}

Tensor SimpleGateLoopLayerImpl::forward_normalised(const Tensor& x, Tensor* state,
                                                   const Packing& packing) {
  check_sequence(kSimpleGateLoopLayer, x, dim_);
  check_packing(kSimpleGateLoopLayer, "x", x, packing);
  if (!state) return run(x, std::nullopt, packing).y;
  check_not_reversed();
  std::optional<Tensor> initial;
  if (state->defined()) initial = *state;
  const auto steps = run(x, initial, packing);
  *state = steps.final_state.detach();
  return steps.y;
}

void SimpleGateLoopLayerImpl::check_not_reversed() const {
  TORCH_CHECK(!options_.reverse, kSimpleGateLoopLayer,
              ": a reversed layer has no cache: its recurrence starts at the last step");
}

std::pair<Tensor, SimpleGateLoopCache> SimpleGateLoopLayerImpl::forward_with_cache(
    const Tensor& x, const SimpleGateLoopCache& cache) {
  check_not_reversed();
  check_sequence(kSimpleGateLoopLayer, x, dim_);
  const auto batch = x.size(0);

  std::optional<Tensor> initial;
  const bool continued = cache.a.defined() || cache.kv.defined();
  if (continued) {
    check_cache("a", cache.a, batch * dim_);
    check_cache("kv", cache.kv, batch * dim_);
    initial = cache.kv.view({batch, dim_});
  }
  const auto steps = run(normalised(x), initial);
  const auto h = steps.final_state.detach();
  auto a = steps.transition.detach().to(h.scalar_type()).sigmoid().prod(1).view({-1, 1});
  if (continued) a = a * cache.a;
  return {steps.y, {a, h.view({-1, 1})}};
}

}  // namespace gateloop::nn
