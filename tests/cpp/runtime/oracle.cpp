#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <complex>
#include <variant>

namespace gateloop::test {
namespace {

using Row = std::vector<double>;
using Rows = std::vector<Row>;  // (T, channels)

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

std::complex<double> polar_gate(double re, double im) {
  const double r = std::hypot(re, im);
  return r == 0 ? 0.5 : sigmoid(r) / r * std::complex<double>(re, im);
}

/// To 8 significant bits, halves to even.
double nearest_bfloat16(double value) {
  int exponent = 0;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, 8)), exponent - 8);
}

class Oracle {
 public:
  Oracle(const model::ModelSpec& spec, const Weights& weights, Inputs inputs)
      : spec_(spec), weights_(weights), inputs_(inputs) {}

  Rows run(const std::vector<std::int64_t>& ids) const {
    const Row& embedding = weights_.at("token_emb.weight");
    Rows x;
    for (const std::int64_t id : ids)
      x.emplace_back(embedding.begin() + id * spec_.dim, embedding.begin() + (id + 1) * spec_.dim);
    for (std::size_t i = 0; i < spec_.layers.size(); ++i)
      x = layer("layers." + std::to_string(i) + ".", spec_.layers[i], x);
    if (!spec_.post_norm) x = rms_norm("to_logits.0.gamma", x);
    if (spec_.tie_embeddings) return product("token_emb.weight", x);
    return product(spec_.post_norm ? "to_logits.weight" : "to_logits.1.weight", x);
  }

 private:
  Rows product(const std::string& name, const Rows& x, const std::string& bias = "") const {
    const Row& w = weights_.at(name);
    const std::size_t columns = x[0].size(), rows = w.size() / columns;
    Rows y;
    for (Row in : x) {
      if (inputs_ == Inputs::kBFloat16)
        std::transform(in.begin(), in.end(), in.begin(), nearest_bfloat16);
      Row& out = y.emplace_back(rows);
      for (std::size_t r = 0; r < rows; ++r) {
        out[r] = bias.empty() ? 0 : weights_.at(bias)[r];
        for (std::size_t c = 0; c < columns; ++c) out[r] += w[r * columns + c] * in[c];
      }
    }
    return y;
  }

  Rows rms_norm(const std::string& gain, Rows x) const {
    for (Row& row : x) {
      double squares = 0;
      for (const double value : row) squares += value * value;
      const double scale = std::sqrt(row.size()) / std::max(std::sqrt(squares), 1e-12);
      for (std::size_t c = 0; c < row.size(); ++c) row[c] *= scale * weights_.at(gain)[c];
    }
    return x;
  }
  Rows layer_norm(const std::string& name, Rows x) const {
    for (Row& row : x) {
      double mean = 0, variance = 0;
      for (const double value : row) mean += value / row.size();
      for (const double value : row) variance += (value - mean) * (value - mean) / row.size();
      for (std::size_t c = 0; c < row.size(); ++c)
        row[c] = (row[c] - mean) / std::sqrt(variance + 1e-5) * weights_.at(name + ".weight")[c] +
                 weights_.at(name + ".bias")[c];
    }
    return x;
  }

  static Rows sum(Rows x, const Rows& y) {
    for (std::size_t t = 0; t < x.size(); ++t)
      for (std::size_t c = 0; c < x[t].size(); ++c) x[t][c] += y[t][c];
    return x;
  }

  template <class F>
  Rows residual(const std::string& name, const Rows& x, const F& fn) const {
    if (spec_.post_norm) return layer_norm(name + "norm", sum(fn(x), x));
    return sum(fn(rms_norm(name + "norm.gamma", x)), x);
  }

  Rows layer(const std::string& name, const model::LayerSpec& layer, Rows x) const {
    if (layer.simple_gate_loop) x = sum(simple(name + "2.", *layer.simple_gate_loop, x), x);
    if (const auto* s = std::get_if<model::GateLoopSpec>(&layer.mixer))
      x = residual(name + "0.", x,
                   [&](const Rows& in) { return gate_loop(name + "0.fn.", *s, in); });
    if (const auto* s = std::get_if<model::AttentionSpec>(&layer.mixer))
      x = residual(name + "0.", x,
                   [&](const Rows& in) { return attention(name + "0.fn.", *s, in); });
    return residual(name + "1.", x, [&](const Rows& in) {
      Rows hidden = product(name + "1.fn.0.weight", in, name + "1.fn.0.bias");
      for (Row& row : hidden)
        for (double& value : row) value *= 0.5 * (1 + std::erf(value / std::sqrt(2)));
      return product(name + "1.fn.2.weight", hidden, name + "1.fn.2.bias");
    });
  }

  Rows simple(const std::string& name, const model::SimpleGateLoopSpec& s, const Rows& x) const {
    const Rows qkva =
        product(name + "to_qkva.0.weight", s.prenorm ? rms_norm(name + "norm.gamma", x) : x);
    const auto dim = static_cast<std::size_t>(spec_.dim);
    Rows y;
    Row h(dim);
    for (const Row& row : qkva) {
      Row& out = y.emplace_back(dim);
      for (std::size_t c = 0; c < dim; ++c) {
        h[c] = sigmoid(row[2 * dim + c]) * h[c] + row[dim + c];
        out[c] = row[c] * h[c];
      }
    }
    return s.post_ln ? layer_norm(name + "maybe_post_ln", y) : y;
  }

  /// Transition i of one step.
  std::complex<double> transition(const model::GateLoopSpec& s, const Row& z, std::size_t i) const {
    if (spec_.ablation.state_transition) return 1;
    if (s.gate == model::Gate::kSigmoid) return sigmoid(z[i]);
    const double second = spec_.ablation.complex ? 0 : z[2 * i + 1];
    if (s.gate == model::Gate::kMagnitudePhase) return std::polar(sigmoid(z[2 * i]), second);
    return polar_gate(z[2 * i], second);
  }

  double input_scale(const model::GateLoopSpec& s, std::complex<double> a) const {
    if (spec_.ablation.state_transition) return 1;
    switch (s.normalize_input) {
      case model::NormalizeInput::kNone:
        return 1;
      case model::NormalizeInput::kMean:
        return 1 - std::abs(a);
      case model::NormalizeInput::kVariance:
        return std::sqrt(1 - std::norm(a));
    }
    return 0;
  }

  /// 1, x_i, x_i²/√2, x_i x_j for j < i, or x where the spec has no map.
  static Row features(const model::GateLoopSpec& s, const Row& x) {
    if (s.feature_map == model::FeatureMap::kNone) return x;
    Row all = {1};
    all.insert(all.end(), x.begin(), x.end());
    for (const double value : x) all.push_back(value * value / std::sqrt(2));
    for (std::size_t i = 0; i < x.size(); ++i)
      for (std::size_t j = 0; j < i; ++j) all.push_back(x[i] * x[j]);
    return all;
  }

  void swish_gates(const std::string& weight, const Rows& x, Rows& y) const {
    const Rows gates = product(weight, x);
    for (std::size_t t = 0; t < y.size(); ++t)
      for (std::size_t c = 0; c < y[t].size(); ++c) y[t][c] *= gates[t][c] * sigmoid(gates[t][c]);
  }

  Rows gate_loop(const std::string& fn, const model::GateLoopSpec& s, const Rows& x) const {
    const Rows qkv = product(fn + "to_qkv.weight", x);
    const Rows z = product(fn + "to_a.0.weight", x, fn + "to_a.0.bias");
    const auto inner = static_cast<std::size_t>(s.dim_inner);
    const auto width = static_cast<std::size_t>(s.dim_keys());
    const auto heads = static_cast<std::size_t>(s.heads);
    const std::size_t keys = width / heads, values = inner / heads;
    const bool maps = s.feature_map != model::FeatureMap::kNone;
    Rows y;
    std::vector<std::complex<double>> states(static_cast<std::size_t>(s.state_channels()));
    for (std::size_t t = 0; t < x.size(); ++t) {
      Row& out = y.emplace_back(inner);
      for (std::size_t head = 0; head < heads; ++head) {
        Row q, k;
        std::vector<std::complex<double>> a;
        for (std::size_t i = head * keys; i < (head + 1) * keys; ++i) {
          a.push_back(transition(s, z[t], s.per_key_transitions ? i : head));
          q.push_back(qkv[t][i] / (maps ? std::sqrt(static_cast<double>(keys)) : 1));
          k.push_back(qkv[t][width + i] * input_scale(s, a.back()));
        }
        q = features(s, q), k = features(s, k);
        for (std::size_t i = 0; i < k.size(); ++i) {
          for (std::size_t j = 0; j < values; ++j) {
            const double v = s.joint_kv ? 1 : qkv[t][2 * width + head * values + j];
            auto& h = states[(head * k.size() + i) * values + j];
            h = (maps ? a[0] : a[i]) * h + k[i] * v;
            out[head * values + j] += q[i] * h.real();
          }
        }
      }
    }
    if (s.sub_ln) y = layer_norm(fn + "maybe_sub_ln", y);
    if (s.add_swish_gating) swish_gates(fn + "to_gates.0.weight", x, y);
    return s.projects(spec_.dim) ? product(fn + "to_out.weight", y) : y;
  }

  /// q and k of one row as attention multiplies them: turned, and scaled by relative positions.
  void place(const std::string& fn, const model::AttentionSpec& s, std::size_t t, const Row* z,
             Row& row) const {
    const auto inner = static_cast<std::size_t>(s.dim_inner());
    const auto d = static_cast<std::size_t>(s.dim_head);
    for (std::size_t h = 0; h < inner; h += d) {
      std::complex<double> product = 1;
      for (std::size_t c = 0; c + 1 < d; c += 2) {
        double* const q = row.data() + h + c;
        double* const k = q + inner;
        if (s.rotary_emb) {
          const double angle = t * weights_.at(fn + "rotary_emb.freqs")[c / 2];
          for (double* const pair : {q, k}) {
            const std::complex<double> turned =
                std::complex(pair[0], pair[1]) * std::polar(1.0, angle);
            pair[0] = turned.real(), pair[1] = turned.imag();
          }
        }
        if (z == nullptr) continue;
        product *= polar_gate((*z)[h + c], spec_.ablation.complex ? 0 : (*z)[h + c + 1]);
        const double scale = std::max(product.real(), 1e-10);
        for (int i = 0; i < 2; ++i) q[i] *= scale, k[i] /= scale;
      }
    }
  }

  Rows attention(const std::string& fn, const model::AttentionSpec& s, const Rows& x) const {
    Rows qkv = product(fn + "to_qkv.0.weight", x);
    const bool relative = s.data_dependent_rel_pos && !spec_.ablation.state_transition;
    const Rows z = relative ? product(fn + "to_a.0.weight", x) : Rows(x.size());
    for (std::size_t t = 0; t < x.size(); ++t) place(fn, s, t, relative ? &z[t] : nullptr, qkv[t]);

    const auto inner = static_cast<std::size_t>(s.dim_inner());
    const auto d = static_cast<std::size_t>(s.dim_head);
    const auto window = static_cast<std::size_t>(s.window.value_or(1'000'000));
    Rows y;
    for (std::size_t t = 0; t < x.size(); ++t) {
      Row& out = y.emplace_back(inner);
      const std::size_t begin = t + 1 > window ? t + 1 - window : 0;
      for (std::size_t h = 0; h < inner; h += d) {
        Row weights;
        for (std::size_t u = begin; u <= t; ++u) {
          double score = 0;
          for (std::size_t c = h; c < h + d; ++c) score += qkv[t][c] * qkv[u][inner + c];
          weights.push_back(score / std::sqrt(static_cast<double>(d)));
        }
        if (s.softmax_normalize) normalize(weights);
        for (std::size_t u = begin; u <= t; ++u)
          for (std::size_t c = h; c < h + d; ++c)
            out[c] += weights[u - begin] * qkv[u][2 * inner + c];
      }
    }
    if (s.add_swish_gating) swish_gates(fn + "to_gates.0.weight", x, y);
    return product(fn + "to_out.1.weight", y, fn + "to_out.1.bias");
  }

  static void normalize(Row& scores) {
    const double most = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - most);
    for (double& score : scores) score /= total;
  }

  const model::ModelSpec& spec_;
  const Weights& weights_;
  Inputs inputs_;
};

}  // namespace

std::vector<double> oracle_logits(const model::ModelSpec& spec, const Weights& weights,
                                  const std::vector<std::int64_t>& ids, Inputs inputs) {
  std::vector<double> logits;
  for (const Row& row : Oracle(spec, weights, inputs).run(ids))
    logits.insert(logits.end(), row.begin(), row.end());
  return logits;
}

}  // namespace gateloop::test
