#pragma once

/// A model as a list of stages: layers are defined here once, for both ways of reading, one row and
/// many.
#include <cstdint>
#include <string>
#include <vector>

#include "gateloop/runtime.h"
#include "recurrence/inference.h"
#include "runtime/weight_set.h"

namespace gateloop::runtime {

/// Without a gain: the identity. With a gain alone RMSNorm, with a bias too LayerNorm.
struct Norm {
  const float* gain = nullptr;
  const float* bias = nullptr;
};
/// `to` may be x.
void apply(const Norm& norm, const float* x, std::int64_t n, float* to);

/// What a stage's products read, made from what earlier stages left:
enum class Input : std::uint8_t {
  kSum,     ///< x = after(sum), in = before(x)
  kSimple,  ///< x = x + after(simple), in = before(x)
  kMixed,   ///< in = after(mixed) times the gates, if there are any
  kHidden,  ///< in = hidden
};

/// What becomes of the products:
enum class Output : std::uint8_t {
  kSimple,     ///< simple = the simple gate loop of (q, kv, z)
  kGateLoop,   ///< mixed = GateLoop of (q, k, v, z), and the gates' swish
  kAttention,  ///< mixed = attention of (q, k, v, z), and the gates' swish
  kSum,        ///< sum = x + products
  kHidden,     ///< hidden = GELU(products)
  kLogits,
};

/// Whether it mixes in time, from a row of products.
constexpr bool mixes(Output output) {
  return output == Output::kSimple || output == Output::kGateLoop || output == Output::kAttention;
}

/// A product of a stage's input. Its rows are `blocks` equal parts, one after the other. Each part
/// has `per_group` rows for every group of the stage.
struct Projection {
  recurrence::Matrix matrix;
  const float* bias = nullptr;
  std::int64_t column = 0;  ///< of its first result in the stage's row of products
  std::int64_t blocks = 1;
  std::int64_t per_group = 1;
};

/// Groups are what one thread computes without the others: channels, or heads.
struct Stage {
  std::size_t layer = 0;
  Input input = Input::kSum;
  Norm after, before;
  std::int64_t input_width = 0;
  std::vector<Projection> projections;
  Output output = Output::kSum;
  std::int64_t output_width = 0;  ///< of all projections
  std::int64_t groups = 0;
  std::int64_t granule = 1;       ///< groups that a thread takes at once: a cache line of channels
  std::int64_t transitions = -1;  ///< column of the raw transitions, -1 without
  std::int64_t gates = -1;        ///< column of the swish gates, -1 without
  const float* rotary = nullptr;  ///< (dim_head / 2) frequencies
};

/// Largest widths of the rows that stages share.
struct Widths {
  std::int64_t input = 0;
  std::int64_t products = 0;  ///< of mixers and simple gate loops
  std::int64_t mixed = 0;
  std::int64_t hidden = 0;
};

/// Immutable once built.
class Network {
 public:
  Network(WeightSet weights, Format format);

  const model::ModelSpec& spec() const { return weights_.spec(); }
  const WeightSet& weights() const { return weights_; }
  const std::vector<Stage>& stages() const { return stages_; }
  const Widths& widths() const { return widths_; }
  const recurrence::Matrix& embedding() const { return embedding_; }
  std::uint64_t digest() const { return digest_; }
  std::int64_t weight_bytes() const { return weight_bytes_; }
  std::int64_t copied_bytes() const { return weights_.copied_bytes(); }

  std::int64_t dim() const { return spec().dim; }
  std::int64_t num_tokens() const { return spec().num_tokens; }

 private:
  class Builder;

  WeightSet weights_;
  recurrence::Matrix embedding_;
  std::vector<Stage> stages_;
  Widths widths_;
  std::uint64_t digest_ = 0;
  std::int64_t weight_bytes_ = 0;
};

}  // namespace gateloop::runtime
