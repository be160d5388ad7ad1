#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "gateloop/nn/linear.h"
#include "gateloop/nn/mixer.h"
#include "gateloop/nn/rms_norm.h"

namespace gateloop::nn {

/// The reference's options and defaults; its choice of scan backend has no meaning here.
struct SimpleGateLoopLayerOptions {
  bool prenorm = true;
  bool post_ln = false;
  bool reverse = false;
};

/// What SimpleGateLoopLayer carries from one call to the next, as the reference's cache: a cache
/// made by one continues in the other. Default-constructed: the start of a sequence.
struct SimpleGateLoopCache {
  torch::Tensor a =
      {};  ///< (B · dim, 1): product of all transitions so far; no output depends on it.
  torch::Tensor kv = {};  ///< (B · dim, 1): the recurrence h.
};

/// The simplified, real GateLoop: q, kv, z = chunks of Linear(RMSNorm(x)),
/// h_t = σ(z_t) h_{t-1} + kv_t, y_t = q_t h_t, then an optional layer norm. No residual.
///
/// Parameters: to_qkva.0.weight, and by the options norm.gamma, maybe_post_ln.{weight,bias}.
class SimpleGateLoopLayerImpl : public torch::nn::Module {
 public:
  explicit SimpleGateLoopLayerImpl(std::int64_t dim, SimpleGateLoopLayerOptions options = {});

  /// x (B, T, dim) -> (B, T, dim). With `reverse` the recurrence runs from the last step.
  torch::Tensor forward(const torch::Tensor& x);

  /// The same of packed or padded sequences. Apart, because a Sequential takes a forward of one
  /// argument.
  torch::Tensor forward_packed(const torch::Tensor& x, const Packing& packing);

  /// Continues from `cache` with any number of steps; also returns the cache after the last one,
  /// detached from the graph. Throws c10::Error for a reversed layer and for a cache that does not
  /// fit x.
  std::pair<torch::Tensor, SimpleGateLoopCache> forward_with_cache(
      const torch::Tensor& x, const SimpleGateLoopCache& cache = {});

  /// The same with the recurrence h alone, (B, dim), or (N, dim) of packed sequences, undefined at
  /// the start; it is updated.
  torch::Tensor advance(const torch::Tensor& x, torch::Tensor& state, const Packing& packing = {});

  /// Its norm of x; null without `prenorm`.
  const RMSNorm& prenorm() const { return norm_; }

  /// What follows the norm: `x` is what prenorm() gives. As forward_packed, or with a `state` as
  /// advance.
  torch::Tensor forward_normalised(const torch::Tensor& x, torch::Tensor* state,
                                   const Packing& packing);

 private:
  torch::Tensor normalised(const torch::Tensor& x) { return norm_ ? norm_(x) : x; }
  void check_not_reversed() const;
  struct Steps {
    torch::Tensor y, transition, final_state;
  };
  Steps run(const torch::Tensor& x, const std::optional<torch::Tensor>& initial_state,
            const Packing& packing = {});

  std::int64_t dim_;
  SimpleGateLoopLayerOptions options_;
  RMSNorm norm_{nullptr};
  Linear to_qkva_{nullptr};
  torch::nn::LayerNorm post_ln_{nullptr};
};
TORCH_MODULE(SimpleGateLoopLayer);

}  // namespace gateloop::nn
