#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <span>

#include "gateloop/nn/transformer.h"
#include "gateloop/runtime.h"

namespace gateloop::nn {

/// The model as runtime::Session reads it, in the memory of its parameters, which must not change
/// meanwhile; float64 is copied to float32, and parameters on another device to the CPU. Decoding
/// by a session takes a fraction of the time of the modules, one operator after the other.
runtime::Model runtime_model(const Transformer& transformer);

/// The modules of a model that was opened from a directory, in eval mode. They are float32,
/// whatever the type that the session computes in. Parameters stored as float32 are in the memory
/// of `model`: read-only, and without gradients. Others are converted copies. Throws
/// std::invalid_argument for a model without options.
Transformer modules_of(const runtime::Model& model);

/// Reads with modules, on their device and in their type; the sum of surprise is float32's. On the
/// CPU a Session is faster. A long prompt goes through the layers in parts. Throws
/// std::invalid_argument for ids that are not (B, T) in [0, num_tokens), and another B than before.
class ModuleReader final : public runtime::Reader {
 public:
  /// Sets eval mode.
  explicit ModuleReader(Transformer transformer);

  const Transformer& transformer() const { return transformer_; }

  const model::ModelSpec& spec() const override;
  std::span<const float> prefill(std::span<const std::int64_t> ids,
                                 std::int64_t batch = 1) override;
  double surprise(std::span<const std::int64_t> ids, std::span<const std::int64_t> next,
                  std::int64_t batch = 1) override;
  void restart() override;
  std::int64_t position() const override;
  std::int64_t state_bytes() const override;

 private:
  torch::Tensor on_device(std::span<const std::int64_t> ids, std::int64_t batch) const;
  torch::Tensor logits_after(const torch::Tensor& ids);

  Transformer transformer_;
  TransformerState state_;
  std::int64_t batch_ = 0, position_ = 0;
  torch::Tensor last_logits_;  // (B, num_tokens) float32 on the CPU
};

}  // namespace gateloop::nn
