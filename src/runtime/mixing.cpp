#include "runtime/mixing.h"

#include <algorithm>
#include <variant>

#include "runtime/rows.h"

namespace gateloop::runtime {

using namespace recurrence;

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
    z_ = 2 * width_;
  } else if (stage.output == Output::kGateLoop) {
    gate_loop_ = &std::get<model::GateLoopSpec>(layer.mixer);
    width_ = gate_loop_->dim_inner;
    joint_ = gate_loop_->joint_kv;
    z_ = stage.projections[1].column;
    scans_ = gate_loop_->has_max_heads();
    kind_ = spec_.ablation.state_transition           ? Kind::kSum
            : gate_loop_->gate == model::Gate::kPolar ? Kind::kPolar
                                                      : Kind::kSigmoid;
    parts_ = kind_ == Kind::kPolar ? 2 : 1;
  } else {
    attention_ = &std::get<model::AttentionSpec>(layer.mixer);
    width_ = attention_->dim_inner();
    z_ = 3 * width_;
    scans_ = false;
  }
  kv_ = width_;
}

void Mixing::prepare_row(std::int64_t row, std::int64_t first, std::int64_t last) const {
  float* const at = products(row);
  const std::int64_t per_group = width_ / stage_.groups;
  const std::int64_t begin = first * per_group, n = (last - first) * per_group;
  if (stage_.gates >= 0) swish_row(at + stage_.gates + begin, n);
  if (gate_loop_ != nullptr && gate_loop_->gate == model::Gate::kPolar && spec_.ablation.complex) {
    for (std::int64_t g = first; g < last; ++g) at[z_ + 2 * g + 1] = 0;
  }
  if (scans_ && !joint_ && kind_ != Kind::kPolar)
    multiply_row(at + kv_ + width_ + begin, at + kv_ + begin, n);
}

/// f(kernel), with the kernel of these channels.
template <class F>
void Mixing::with_scan(std::int64_t first, std::int64_t last, float* next, const F& f) const {
  const auto part = [&](std::int64_t column) {
    return ConstSequence{rows_.products + column, rows_.time * rows_.products_stride,
                         rows_.products_stride};
  };
  const Shape shape{rows_.batch, rows_.time, last - first};
  const Sequence y{rows_.y + first, rows_.time * rows_.y_stride, rows_.y_stride};
  const ConstSequence ones{ones_, 0, 0};
  const float* const initial =
      (stage_.output == Output::kSimple ? layer_.simple : layer_.recurrence).data() +
      parts_ * first;
  const ConstSequence q = part(first), kv = part(kv_ + first), z = part(z_ + parts_ * first);
  switch (kind_) {
    case Kind::kPolar:
      return f(PolarGateLoop{.shape = shape,
                             .q = q,
                             .k = kv,
                             .v = joint_ ? ones : part(kv_ + width_ + first),
                             .z = z,
                             .initial_state = initial,
                             .y = y,
                             .final_state = next});
    case Kind::kSigmoid:
      return f(
          SimpleGateLoop{.shape = shape,
                         .normalize_input = gate_loop_ != nullptr && gate_loop_->normalize_input,
                         .q = q,
                         .kv = kv,
                         .z = z,
                         .initial_state = initial,
                         .y = y,
                         .final_state = next});
    case Kind::kSum:
      return f(LinearRecurrence{.shape = shape,
                                .a = ones,
                                .x = kv,
                                .initial_state = initial,
                                .h = y,
                                .final_state = next});
  }
}

std::int64_t Mixing::state_numbers() const { return rows_.batch * width_ * parts_; }

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
  const std::int64_t n = rows_.batch * (last - first) * parts_;
  std::copy_n(to, n, state.data() + parts_ * first);
  if (kind_ != Kind::kSum) return;
  for (std::int64_t row = 0; row < rows_.batch * rows_.time; ++row) {
    multiply_row(products(row) + first, rows_.y + row * rows_.y_stride + first, last - first);
  }
}

std::int64_t Mixing::head_scratch() const {
  if (attention_ == nullptr) return 0;
  return padded(layer_.steps->capacity()) + padded(attention_->dim_head);
}

void Mixing::head(std::int64_t sequence, std::int64_t head, float* scratch) const {
  if (attention_ != nullptr) return attend_head(*attention_, sequence, head, scratch);
  wide_head(sequence, head);
}

void Mixing::wide_head(std::int64_t sequence, std::int64_t head) const {
  const std::int64_t d = gate_loop_->dim_head();
  float* const state =
      layer_.recurrence.data() + (sequence * gate_loop_->heads + head) * parts_ * d * d;
  for (std::int64_t t = 0; t < rows_.time; ++t) {
    const std::int64_t r = sequence * rows_.time + t;
    float* const row = products(r);
    float* const k = row + kv_ + head * d;
    float* const z = row + z_ + parts_ * head;
    HeadStep step{.d = d,
                  .complex = kind_ == Kind::kPolar,
                  .q = row + head * d,
                  .k = k,
                  .v = row + kv_ + width_ + head * d,
                  .state = state,
                  .y = rows_.y + r * rows_.y_stride + head * d};
    if (kind_ == Kind::kPolar) {
      polar_gate_row(z, z, 1);
      step.a_re = z[0];
      step.a_im = z[1];
    } else if (kind_ == Kind::kSigmoid) {
      float rest = 0;
      sigmoid_row(z, &step.a_re, &rest, 1);
      if (gate_loop_->normalize_input)
        for (std::int64_t i = 0; i < d; ++i) k[i] *= rest;
    }
    run(step);
  }
}

}  // namespace gateloop::runtime
