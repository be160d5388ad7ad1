// A decoding step: one token through a whole GateLoop Transformer, in four phases a layer.
#include <algorithm>
#include <stdexcept>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cpu/phases.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/transformer_step.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/dot-inl.h"
#include "recurrence/cpu/gates-inl.h"
#include "recurrence/cpu/rows-inl.h"

#ifndef GATELOOP_RECURRENCE_CPU_TRANSFORMER_STEP_ONCE_
#define GATELOOP_RECURRENCE_CPU_TRANSFORMER_STEP_ONCE_
namespace gateloop::recurrence::cpu {

enum Phase : std::int64_t { kMix, kProject, kExpand, kContract, kPhasesPerLayer };

/// Row-shaped buffers in scratch, of whole cache lines, counted in numbers of the accumulation
/// type. A unit keeps its own copy of the residual stream and of what its products read: norms are
/// computed by every unit for itself, which costs less than another phase.
struct StepBuffers {
  std::int64_t dim, inner, hidden, widest;

  explicit StepBuffers(const TransformerStep& p)
      : dim(padded(p.dim)),
        inner(padded(p.inner)),
        hidden(padded(p.hidden)),
        widest(std::max({dim, inner, hidden})) {}
  /// Of any type, whole cache lines.
  static std::int64_t padded(std::int64_t n) {
    return (n + kCacheLine - 1) / kCacheLine * kCacheLine;
  }
  /// residual sum; read-out and gates; hidden layer.
  std::int64_t shared() const { return dim + 2 * inner + hidden; }
  /// residual stream; input of the products; q, k, v, z (2).
  std::int64_t own() const { return dim + widest + 5 * inner; }
};

}  // namespace gateloop::recurrence::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

template <class S>
class Step {
 public:
  using T = Accumulation<S>;

  Step(const TransformerStep& p, std::int64_t units, T* buffers)
      : p_(p),
        n_(p),
        units_(units),
        sum_(buffers),
        y_(sum_ + n_.dim),
        gates_(y_ + n_.inner),
        hidden_(gates_ + n_.inner),
        own_(hidden_ + n_.hidden) {}

  void operator()(std::int64_t phase, std::int64_t unit) const {
    const std::int64_t layer = phase / kPhasesPerLayer;
    if (layer == static_cast<std::int64_t>(p_.layers.size())) return Logits(unit);
    switch (phase % kPhasesPerLayer) {
      case kMix:
        return Mix(layer, unit);
      case kProject:
        return Project(p_.layers[static_cast<std::size_t>(layer)], unit);
      case kExpand:
        return Expand(p_.layers[static_cast<std::size_t>(layer)], unit);
      default:
        return Contract(p_.layers[static_cast<std::size_t>(layer)], unit);
    }
  }

 private:
  struct Own {
    T *x, *in, *q, *k, *v, *z;
  };
  Own OwnOf(std::int64_t unit) const {
    T* x = own_ + unit * n_.own();
    T* q = x + n_.dim + n_.widest;
    return {x, x + n_.dim, q, q + n_.inner, q + 2 * n_.inner, q + 3 * n_.inner};
  }

  struct Share {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
  };
  /// Of n rows, on cache lines of what they give.
  Share ShareOf(std::int64_t n, std::int64_t unit) const {
    constexpr std::int64_t kLine = kCacheLine / static_cast<std::int64_t>(sizeof(T));
    const std::int64_t lines = (n + kLine - 1) / kLine;
    return {std::min(n, lines * unit / units_ * kLine),
            std::min(n, lines * (unit + 1) / units_ * kLine)};
  }

  static const S* As(const void* weights) { return static_cast<const S*>(weights); }

  /// to[r - rows.begin] = matrix[r] · in + bias[r].
  void Multiply(const void* matrix, const void* bias, Share rows, std::int64_t columns, const T* in,
                T* to) const {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      to[r - rows.begin] = Dot(As(matrix) + r * columns, in, columns);
    }
    if (bias != nullptr) AddRow(As(bias) + rows.begin, to, rows.size());
  }

  /// The token read, as the residual stream into own.x and as the first products read it into
  /// own.in. `norm`: the one before them, with post-norm none.
  void Embed(const Own& own, const void* norm) const {
    Widen(As(p_.embedding), p_.dim, own.x);
    if (p_.post_norm) {
      std::copy_n(own.x, p_.dim, own.in);
    } else {
      RmsNormRow(own.x, As(norm), p_.dim, own.in);
    }
    ArrangeForDot<S>(own.in, p_.dim);
  }

  /// The same of the sum that the phase before has left. `norm`: the one before the products that
  /// follow, with post-norm after the layer whose sum it is.
  void Receive(const Own& own, const void* norm, const void* bias) const {
    if (p_.post_norm) {
      LayerNormRow(sum_, As(norm), As(bias), p_.dim, own.x);
      std::copy_n(own.x, p_.dim, own.in);
    } else {
      std::copy_n(sum_, p_.dim, own.x);
      RmsNormRow(sum_, As(norm), p_.dim, own.in);
    }
    ArrangeForDot<S>(own.in, p_.dim);
  }

  void Mix(std::int64_t index, std::int64_t unit) const {
    const auto& layer = p_.layers[static_cast<std::size_t>(index)];
    const Own own = OwnOf(unit);
    if (index == 0) {
      Embed(own, layer.mixer_norm);
    } else {
      const auto& before = p_.layers[static_cast<std::size_t>(index - 1)];
      Receive(own, p_.post_norm ? before.ff_norm : layer.mixer_norm, before.ff_norm_bias);
    }

    const Share share = ShareOf(p_.inner, unit);
    const auto part = [&](std::int64_t i) {
      return Share{i * p_.inner + share.begin, i * p_.inner + share.end};
    };
    Multiply(layer.qkv, nullptr, part(0), p_.dim, own.in, own.q);
    Multiply(layer.qkv, nullptr, part(1), p_.dim, own.in, own.k);
    Multiply(layer.qkv, nullptr, part(2), p_.dim, own.in, own.v);
    const std::int64_t parts = p_.sigmoid_gate ? 1 : 2;
    Multiply(layer.transition, layer.transition_bias, {parts * share.begin, parts * share.end},
             p_.dim, own.in, own.z);
    const T* state = static_cast<const T*>(layer.state);
    if (state != nullptr) state += parts * share.begin;
    T* next = static_cast<T*>(layer.next_state) + parts * share.begin;
    T* y = y_ + share.begin;
    ForEachVector<T>(share.size(), [&](auto d, std::int64_t c) HWY_ATTR {
      if (p_.sigmoid_gate) {
        Advance<Real<decltype(d)>>(d, own, state, next, y, c);
      } else {
        Advance<Complex<decltype(d)>>(d, own, state, next, y, c);
      }
    });
    if (layer.gates != nullptr) {
      Multiply(layer.gates, nullptr, share, p_.dim, own.in, gates_ + share.begin);
      Swish(gates_ + share.begin, share.size());
    }
  }

  /// h = a h + x, y = q Re(h) for a vector of channels.
  template <class V, class D>
  HWY_INLINE void Advance(D d, const Own& own, const T* state, T* next, T* y,
                          std::int64_t c) const {
    Real<D> x = Mul(d, Load<Real<D>>(d, own.k, c), Load<Real<D>>(d, own.v, c));
    V a;
    if constexpr (V::kParts == 2) {
      a = MakePolarGate(d, Load<V>(d, own.z, c)).a;
    } else {
      const auto gate = MakeSigmoidGate(d, Load<V>(d, own.z, c));
      a = gate.a;
      if (p_.normalize_input) x = Mul(d, gate.rest, x);
    }
    const V h = MulAdd(d, a, state == nullptr ? Zeros<V>(d) : Load<V>(d, state, c), x);
    Store(d, h, next, c);
    Store(d, Mul(d, Load<Real<D>>(d, own.q, c), Real<D>{h.re}), y, c);
  }

  void Project(const TransformerLayer& layer, std::int64_t unit) const {
    const Own own = OwnOf(unit);
    if (layer.sub_norm != nullptr) {
      LayerNormRow(y_, As(layer.sub_norm), As(layer.sub_norm_bias), p_.inner, own.in);
    } else {
      std::copy_n(y_, p_.inner, own.in);
    }
    if (layer.gates != nullptr) MultiplyRow(gates_, own.in, p_.inner);
    const Share share = ShareOf(p_.dim, unit);
    if (layer.out != nullptr) {
      ArrangeForDot<S>(own.in, p_.inner);
      Multiply(layer.out, nullptr, share, p_.inner, own.in, sum_ + share.begin);
    } else {
      std::copy_n(own.in + share.begin, share.size(), sum_ + share.begin);
    }
    AddRow(own.x + share.begin, sum_ + share.begin, share.size());
  }

  void Expand(const TransformerLayer& layer, std::int64_t unit) const {
    const Own own = OwnOf(unit);
    Receive(own, p_.post_norm ? layer.mixer_norm : layer.ff_norm, layer.mixer_norm_bias);
    const Share share = ShareOf(p_.hidden, unit);
    Multiply(layer.expand, layer.expand_bias, share, p_.dim, own.in, hidden_ + share.begin);
    Gelu(hidden_ + share.begin, share.size());
  }

  void Contract(const TransformerLayer& layer, std::int64_t unit) const {
    const Own own = OwnOf(unit);
    const Share share = ShareOf(p_.dim, unit);
    std::copy_n(hidden_, p_.hidden, own.in);
    ArrangeForDot<S>(own.in, p_.hidden);
    Multiply(layer.contract, layer.contract_bias, share, p_.hidden, own.in, sum_ + share.begin);
    AddRow(own.x + share.begin, sum_ + share.begin, share.size());
  }

  void Logits(std::int64_t unit) const {
    const Own own = OwnOf(unit);
    if (p_.layers.empty()) {
      Embed(own, p_.final_norm);
    } else {
      const auto& last = p_.layers.back();
      Receive(own, p_.post_norm ? last.ff_norm : p_.final_norm, last.ff_norm_bias);
    }
    const Share share = ShareOf(p_.tokens, unit);
    const hn::CappedTag<T, 1> one;
    for (std::int64_t r = share.begin; r < share.end; ++r) {
      const T logit = Dot(As(p_.to_logits) + r * p_.dim, own.in, p_.dim);
      StoreReal(one, hn::Set(one, logit), static_cast<S*>(p_.logits) + r, /*stream=*/false);
    }
  }

  const TransformerStep& p_;
  const StepBuffers n_;
  const std::int64_t units_;
  T *sum_, *y_, *gates_, *hidden_, *own_;
};

void RunTransformerStep(const TransformerStep& p, std::int64_t units, const Executor& executor,
                        void* scratch) {
  const std::int64_t phases = static_cast<std::int64_t>(p.layers.size()) * kPhasesPerLayer + 1;
  Phases order(scratch, units);
  void* const buffers = static_cast<std::byte*>(scratch) + Phases::bytes(units);
  WithStorageOf(p.dtype, [&]<class S>() {
    order.run(executor, phases, Step<S>(p, units, static_cast<Accumulation<S>*>(buffers)));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RunTransformerStep);
namespace {

void check_sizes(const TransformerStep& p) {
  check("TransformerStep", {1, p.tokens, p.dim}, p.dtype, /*complex_allowed=*/false);
  if (p.dim < 1 || p.inner < 1 || p.hidden < 1) {
    throw std::invalid_argument("TransformerStep: dim, inner and hidden must be positive");
  }
  for (const TransformerLayer& layer : p.layers) {
    if (layer.out == nullptr && p.inner != p.dim) {
      throw std::invalid_argument("TransformerStep: without out, inner must be dim");
    }
  }
}

}  // namespace
}  // namespace cpu

std::size_t scratch_bytes(const TransformerStep& p, int threads) {
  const cpu::StepBuffers buffers(p);
  const std::int64_t units = std::max(1, threads);
  return cpu::Phases::bytes(units) +
         static_cast<std::size_t>(buffers.shared() + units * buffers.own()) *
             cpu::accumulation_bytes(p.dtype);
}

void run(const TransformerStep& p, const Executor& executor, void* scratch) {
  using namespace cpu;
  check_sizes(p);
  HWY_DYNAMIC_DISPATCH(RunTransformerStep)(p, std::max(1, executor.threads), executor, scratch);
}

}  // namespace gateloop::recurrence
#endif
