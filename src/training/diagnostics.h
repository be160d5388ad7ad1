#pragma once

/// What the layers of a model do and how they learn, for the log.
#include <torch/torch.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "gateloop/nn/transformer.h"
#include "training/packed_rows.h"

namespace gateloop::training {

/// Symmetric around the median.
inline constexpr std::array kQuantiles = {0.05, 0.25, 0.5, 0.75, 0.95};
using Quantiles = std::array<double, kQuantiles.size()>;

/// The transitions of a GateLoop layer or a simple gate loop, over tokens and channels.
struct TransitionDiagnostics {
  Quantiles magnitudes{};  ///< |a|
  /// Steps in which |a| halves a state: ln(1/2) / ln|a|. Infinite where 1 - |a| underflows.
  Quantiles half_lives{};
  std::optional<Quantiles> phases;  ///< of complex transitions, in (-pi, pi]
};

struct LayerDiagnostics {
  double gradient_norm = 0;  ///< of all the layer's parameters, before clipping
  double update_norm = 0;    ///< of what the update added to them
  double weight_norm = 0;    ///< after the update
  /// Share of the feed-forward's hidden units that are below zero at every token.
  double inactive_units = 0;
  std::optional<TransitionDiagnostics> transitions;  ///< of a GateLoop whose a is not ablated
  std::optional<TransitionDiagnostics> simple_transitions;  ///< of the simple gate loop in front
};
using Diagnostics = std::vector<LayerDiagnostics>;

/// The norms of an update, which is made between construction and diagnose().
class UpdateDiagnosis {
 public:
  /// Gradients are there; a copy of the layers' parameters is held until destruction.
  explicit UpdateDiagnosis(nn::Transformer model);

  /// The weights are updated. Transitions and units are those of a pass in float32 over the first
  /// windows of `text`. Windows have `length` bytes each, and 2048 at most together; the state
  /// starts anew before each `separator` too.
  Diagnostics diagnose(std::span<const std::uint8_t> text, std::int64_t length,
                       Separator separator) const;

 private:
  nn::Transformer model_;
  std::vector<std::vector<torch::Tensor>> before_;  // by layer
  std::vector<double> gradient_norms_;
};

}  // namespace gateloop::training
