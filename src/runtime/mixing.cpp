#include "runtime/mixing.h"

#include <algorithm>
#include <cmath>
#include <variant>

#include "recurrence/features.h"
#include "runtime/rows.h"

namespace gateloop::runtime {

using namespace recurrence;
using model::NormalizeInput;

namespace {

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

Mixing::Mixing(const Network& network, const Stage& stage, StateData& state, const MixRows& rows,
               const float* ones)
    : spec_(network.spec()),
      stage_(stage),
      state_(state),
      layer_(state.layers[stage.layer]),
      rows_(rows),
      ones_(ones) {
  const model::LayerSpec& layer = spec_.layers[stage.layer];
  if (stage.output == Output::kSimple) {
    width_ = spec_.dim;
    kind_ = Kind::kSigmoid;
    joint_ = true;
    k_ = width_;
    z_ = 2 * width_;
  } else if (stage.output == Output::kGateLoop) {
    gate_loop_ = &std::get<model::GateLoopSpec>(layer.mixer);
    const model::GateLoopSpec& s = *gate_loop_;
    const bool moves = !spec_.ablation.state_transition;
    width_ = s.dim_inner;
    joint_ = s.joint_kv;
    k_ = s.dim_keys();
    v_ = 2 * k_;
    z_ = stage.transitions;
    parts_ = moves ? s.transition_parts() : 1;
    if (s.has_max_heads()) {
      kind_ = !moves                            ? Kind::kSum
              : s.gate == model::Gate::kPolar   ? Kind::kPolar
              : s.gate == model::Gate::kSigmoid ? Kind::kSigmoid
                                                : Kind::kNone;
    }
    scales_ = moves && s.normalize_input != NormalizeInput::kNone &&
              !(kind_ == Kind::kSigmoid && s.normalize_input == NormalizeInput::kMean);
  } else {
    attention_ = &std::get<model::AttentionSpec>(layer.mixer);
    width_ = attention_->dim_inner();
    k_ = width_;
    v_ = 2 * width_;
    z_ = 3 * width_;
  }
}

void Mixing::prepare_row(std::int64_t row, std::int64_t first, std::int64_t last) const {
  float* const at = products(row);
  const std::int64_t per_group = width_ / stage_.groups;
  const std::int64_t begin = first * per_group, n = (last - first) * per_group;
  if (stage_.gates >= 0) swish_row(at + stage_.gates + begin, n);
  if (stage_.rotary != nullptr) {
    const std::int64_t sequence = rows_.runs.sequence_of(row);
    rotate(at, first, last, position(sequence) + row - rows_.runs.first(sequence));
  }
  if (gate_loop_ != nullptr && gate_loop_->transition_parts() == 2 && spec_.ablation.complex) {
    const std::int64_t each = gate_loop_->transitions() / stage_.groups;
    for (std::int64_t i = first * each; i < last * each; ++i) at[z_ + 2 * i + 1] = 0;
  }
  if (!scans()) return;
  if (!joint_ && kind_ != Kind::kPolar) multiply_row(at + v_ + begin, at + k_ + begin, n);
  if (!scales_) return;
  for (std::int64_t i = first; i < last; ++i) at[k_ + i] *= input_scale(at + z_ + parts_ * i);
}

/// 1 - |a| or √(1 - |a|²) of one raw transition.
float Mixing::input_scale(const float* z) const {
  const float logit = gate_loop_->gate == model::Gate::kPolar ? std::hypot(z[0], z[1]) : z[0];
  const float rest = sigmoid(-logit);
  return gate_loop_->normalize_input == NormalizeInput::kMean ? rest : std::sqrt(rest * (2 - rest));
}

/// f(kernel), with the kernel of these channels.
template <class F>
void Mixing::with_scan(std::int64_t first, std::int64_t last, float* next, const F& f) const {
  const Runs& runs = rows_.runs;
  const auto part = [&](std::int64_t column) {
    return ConstSequence{rows_.products + column, runs.time * rows_.products_stride,
                         rows_.products_stride};
  };
  const Shape shape{runs.packed() ? 1 : runs.batch, runs.packed() ? runs.rows() : runs.time,
                    last - first};
  const Sequence y{rows_.y + first, runs.time * rows_.y_stride, rows_.y_stride};
  const ConstSequence ones{ones_, 0, 0};
  const float* const initial =
      (stage_.output == Output::kSimple ? layer_.simple : layer_.recurrence).data() +
      parts_ * first;
  const ConstSequence q = part(first), kv = part(k_ + first), z = part(z_ + parts_ * first);
  switch (kind_) {
    case Kind::kNone:
      return;
    case Kind::kPolar:
      return f(PolarGateLoop{.shape = shape,
                             .q = q,
                             .k = kv,
                             .v = joint_ ? ones : part(v_ + first),
                             .z = z,
                             .initial_state = initial,
                             .y = y,
                             .final_state = next,
                             .offsets = runs.starts});
    case Kind::kSigmoid:
      return f(
          SimpleGateLoop{.shape = shape,
                         .normalize_input = gate_loop_ != nullptr && !scales_ &&
                                            gate_loop_->normalize_input != NormalizeInput::kNone,
                         .q = q,
                         .kv = kv,
                         .z = z,
                         .initial_state = initial,
                         .y = y,
                         .final_state = next,
                         .offsets = runs.starts});
    case Kind::kSum:
      return f(LinearRecurrence{.shape = shape,
                                .a = ones,
                                .x = kv,
                                .initial_state = initial,
                                .h = y,
                                .final_state = next,
                                .offsets = runs.starts});
  }
}

std::int64_t Mixing::state_numbers() const { return rows_.runs.batch * width_ * parts_; }

std::size_t Mixing::scan_scratch_bytes(int threads) const {
  std::size_t bytes = 0;
  with_scan(0, width_, nullptr,
            [&](const auto& kernel) { bytes = scratch_bytes(kernel, threads); });
  return bytes;
}

void Mixing::scan(std::int64_t first, std::int64_t last, const Executor& executor, float* next,
                  void* scratch) const {
  if (first == last) return;
  float* const to = next + parts_ * first;
  with_scan(first, last, to, [&](const auto& kernel) { run(kernel, executor, scratch); });
  auto& state = stage_.output == Output::kSimple ? layer_.simple : layer_.recurrence;
  const std::int64_t n = rows_.runs.batch * (last - first) * parts_;
  std::copy_n(to, n, state.data() + parts_ * first);
  if (kind_ != Kind::kSum) return;
  for (std::int64_t row = 0; row < rows_.runs.rows(); ++row) {
    multiply_row(products(row) + first, rows_.y + row * rows_.y_stride + first, last - first);
  }
}

std::int64_t Mixing::head_scratch() const {
  if (attention_ != nullptr) {
    std::int64_t most = 0;
    for (std::int64_t b = 0; b < rows_.runs.batch; ++b) most = std::max(most, attention_scratch(b));
    return most;
  }
  return 2 * padded(gate_loop_->state_keys());
}

void Mixing::head(std::int64_t sequence, std::int64_t head, float* scratch) const {
  if (rows_.runs.steps(sequence) == 0) return;
  if (attention_ != nullptr) return attend_head(*attention_, sequence, head, scratch);
  wide_head(sequence, head, scratch);
}

/// z of a head's transitions become a, and its keys are scaled, in place. `scratch`: (count).
void Mixing::make_transitions(float* z, std::int64_t count, float* k, float* scratch) const {
  const std::int64_t keys_of_each = gate_loop_->key_channels() / count;
  for (std::int64_t i = 0; scales_ && i < count; ++i) {
    const float scale = input_scale(z + parts_ * i);
    for (std::int64_t j = 0; j < keys_of_each; ++j) k[i * keys_of_each + j] *= scale;
  }
  switch (gate_loop_->gate) {
    case model::Gate::kPolar:
      return polar_gate_row(z, z, count);
    case model::Gate::kSigmoid:
      return sigmoid_row(z, z, scratch, count);
    case model::Gate::kMagnitudePhase:
      for (std::int64_t i = 0; i < count; ++i) {
        const float modulus = sigmoid(z[2 * i]), phase = z[2 * i + 1];
        z[2 * i] = modulus * std::cos(phase);
        z[2 * i + 1] = modulus * std::sin(phase);
      }
  }
}

void Mixing::wide_head(std::int64_t sequence, std::int64_t head, float* scratch) const {
  const model::GateLoopSpec& s = *gate_loop_;
  const bool maps = s.feature_map == model::FeatureMap::kTaylor;
  const std::int64_t channels = s.key_channels(), values = s.value_channels();
  const std::int64_t count = s.transitions() / s.heads;
  constexpr float kOne[] = {1, 0};
  const float root = std::sqrt(static_cast<float>(channels));
  for (std::int64_t r = rows_.runs.first(sequence); r < rows_.runs.first(sequence + 1); ++r) {
    float* const row = products(r);
    float *q = row + head * channels, *k = row + k_ + head * channels;
    float* const z = row + z_ + s.transition_parts() * count * head;
    const bool moves = !spec_.ablation.state_transition;
    if (moves) make_transitions(z, count, k, scratch);
    if (maps) {
      for (std::int64_t i = 0; i < channels; ++i) q[i] /= root;
      float* const features = scratch + padded(s.state_keys());
      taylor_features(q, channels, scratch);
      taylor_features(k, channels, features);
      q = scratch;
      k = features;
    }
    run(HeadStep{.keys = s.state_keys(),
                 .values = values,
                 .complex = parts_ == 2,
                 .per_key = moves && s.per_key_transitions,
                 .a = moves ? z : kOne,
                 .q = q,
                 .k = k,
                 .v = joint_ ? ones_ : row + v_ + head * values,
                 .state = layer_.recurrence.data() +
                          (sequence * s.heads + head) * parts_ * s.state_keys() * values,
                 .y = rows_.y + r * rows_.y_stride + head * values});
  }
}

}  // namespace gateloop::runtime
