#include <algorithm>
#include <cmath>
#include <deque>
#include <stdexcept>

#include "harness.h"
#include "recurrence/cpu/target.h"

namespace gateloop::testing {
namespace {

using Row = std::vector<double>;

struct Case {
  DType dtype = DType::kFloat32;
  std::int64_t dim = 24, inner = 24, hidden = 40, tokens = 11, layers = 2;
  bool post_norm = false, sigmoid = false, normalize = false;
  bool sub_norm = false, gates = true, out = true;
};

/// Weights as the kernel reads them, in memory nobody may write to, and as numbers.
class Weights {
 public:
  Weights(DType dtype, std::uint64_t seed) : dtype_(dtype), random_(seed) {}
  const void* draw(Row& values, std::int64_t n, double deviation, double mean = 0) {
    Tensor& tensor = tensors_.emplace_back(dtype_, Dims{1, 1, n});
    Row drawn = random_.normal(static_cast<std::size_t>(n));
    for (double& value : drawn) value = value * deviation + mean;
    tensor.set(drawn);
    values = tensor.get();
    return tensor.data();
  }

 private:
  DType dtype_;
  Random random_;
  std::deque<Tensor> tensors_;
};

struct Layer {
  Row mixer_norm, mixer_bias, qkv, a, a_bias, sub_norm, sub_bias, gates, out;
  Row ff_norm, ff_bias, expand, expand_bias, contract, contract_bias;
  std::vector<Complex> state;
};

struct Model {
  Case c;
  Weights weights;
  Row embedding, final_norm, to_logits;
  std::vector<Layer> layers;
  std::vector<recurrence::TransformerLayer> params;
  const void *embedding_data = nullptr, *final_norm_data = nullptr, *to_logits_data = nullptr;

  explicit Model(const Case& options) : c(options), weights(options.dtype, 5) {
    const double w = 1 / std::sqrt(static_cast<double>(c.dim));
    const std::int64_t parts = c.sigmoid ? 1 : 2;
    embedding_data = weights.draw(embedding, c.dim, 1);
    if (!c.post_norm) final_norm_data = weights.draw(final_norm, c.dim, 0.2, 1);
    to_logits_data = weights.draw(to_logits, c.tokens * c.dim, w);
    for (std::int64_t i = 0; i < c.layers; ++i) {
      Layer& l = layers.emplace_back();
      recurrence::TransformerLayer& p = params.emplace_back();
      p.mixer_norm = weights.draw(l.mixer_norm, c.dim, 0.2, 1);
      p.ff_norm = weights.draw(l.ff_norm, c.dim, 0.2, 1);
      if (c.post_norm) {
        p.mixer_norm_bias = weights.draw(l.mixer_bias, c.dim, 0.2);
        p.ff_norm_bias = weights.draw(l.ff_bias, c.dim, 0.2);
      }
      p.qkv = weights.draw(l.qkv, 3 * c.inner * c.dim, w);
      p.transition = weights.draw(l.a, parts * c.inner * c.dim, w);
      p.transition_bias = weights.draw(l.a_bias, parts * c.inner, 1);
      if (c.sub_norm) {
        p.sub_norm = weights.draw(l.sub_norm, c.inner, 0.2, 1);
        p.sub_norm_bias = weights.draw(l.sub_bias, c.inner, 0.2);
      }
      if (c.gates) p.gates = weights.draw(l.gates, c.inner * c.dim, w);
      if (c.out) p.out = weights.draw(l.out, c.dim * c.inner, w);
      p.expand = weights.draw(l.expand, c.hidden * c.dim, 2 * w);
      p.expand_bias = weights.draw(l.expand_bias, c.hidden, 5);  // on all branches of GELU
      p.contract = weights.draw(l.contract, c.dim * c.hidden, w);
      p.contract_bias = weights.draw(l.contract_bias, c.dim, 1);
      l.state.assign(static_cast<std::size_t>(c.inner), 0);
    }
  }
};

// ---- The definition ----------------------------------------------------------------------------

Row times(const Row& matrix, const Row& x, const Row& bias = {}) {
  Row y(matrix.size() / x.size());
  for (std::size_t r = 0; r < y.size(); ++r) {
    y[r] = bias.empty() ? 0 : bias[r];
    for (std::size_t i = 0; i < x.size(); ++i) y[r] += matrix[r * x.size() + i] * x[i];
  }
  return y;
}

Row rms_norm(const Row& x, const Row& gain) {
  double squares = 0;
  for (const double v : x) squares += v * v;
  Row y(x);
  const double norm = std::max(std::sqrt(squares), 1e-12);
  const double scale = std::sqrt(static_cast<double>(x.size())) / norm;
  for (std::size_t i = 0; i < x.size(); ++i) y[i] *= scale * gain[i];
  return y;
}

Row layer_norm(const Row& x, const Row& gain, const Row& bias) {
  double mean = 0, variance = 0;
  for (const double v : x) mean += v / static_cast<double>(x.size());
  for (const double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
  Row y(x);
  for (std::size_t i = 0; i < x.size(); ++i)
    y[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * gain[i] + bias[i];
  return y;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Row mix(const Case& c, Layer& l, const Row& in) {
  const auto inner = static_cast<std::size_t>(c.inner);
  const Row qkv = times(l.qkv, in), z = times(l.a, in, l.a_bias);
  Row y(inner);
  for (std::size_t i = 0; i < inner; ++i) {
    const Complex a =
        c.sigmoid ? Complex(sigmoid(z[i])) : oracle::polar_gate({z[2 * i], z[2 * i + 1]});
    const double x = qkv[inner + i] * qkv[2 * inner + i] * (c.normalize ? 1 - a.real() : 1);
    l.state[i] = a * l.state[i] + x;
    y[i] = qkv[i] * l.state[i].real();
  }
  if (c.sub_norm) y = layer_norm(y, l.sub_norm, l.sub_bias);
  if (c.gates) {
    const Row g = times(l.gates, in);
    for (std::size_t i = 0; i < inner; ++i) y[i] *= g[i] * sigmoid(g[i]);
  }
  return c.out ? times(l.out, y) : y;
}

Row feed_forward(const Layer& l, const Row& in) {
  Row h = times(l.expand, in, l.expand_bias);
  for (double& v : h) v *= 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
  return times(l.contract, h, l.contract_bias);
}

Row add(Row a, const Row& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

/// Advances the states of the model.
Row logits_of(Model& m) {
  Row x = m.embedding;
  for (Layer& l : m.layers) {
    if (m.c.post_norm) {
      x = layer_norm(add(mix(m.c, l, x), x), l.mixer_norm, l.mixer_bias);
      x = layer_norm(add(feed_forward(l, x), x), l.ff_norm, l.ff_bias);
    } else {
      x = add(mix(m.c, l, rms_norm(x, l.mixer_norm)), x);
      x = add(feed_forward(l, rms_norm(x, l.ff_norm)), x);
    }
  }
  return times(m.to_logits, m.c.post_norm ? x : rms_norm(x, m.final_norm));
}

// ---- The kernel --------------------------------------------------------------------------------

/// `steps` tokens, all the same, from no state on; the last logits and every state.
std::vector<Row> run_steps(Model& m, int steps, const recurrence::Executor& executor) {
  const std::int64_t parts = m.c.sigmoid ? 1 : 2;
  std::deque<StateTensor> states;
  Tensor logits(m.c.dtype, {1, 1, m.c.tokens});
  std::vector<recurrence::TransformerLayer> layers = m.params;
  for (int step = 0; step < steps; ++step) {
    for (auto& layer : layers) {
      layer.state = layer.next_state;
      layer.next_state = states.emplace_back(m.c.dtype, Dims{1, 1, m.c.inner}, parts).data();
    }
    recurrence::TransformerStep p{.dtype = m.c.dtype,
                                  .dim = m.c.dim,
                                  .inner = m.c.inner,
                                  .hidden = m.c.hidden,
                                  .tokens = m.c.tokens,
                                  .post_norm = m.c.post_norm,
                                  .sigmoid_gate = m.c.sigmoid,
                                  .normalize_input = m.c.normalize,
                                  .layers = layers,
                                  .embedding = m.embedding_data,
                                  .final_norm = m.final_norm_data,
                                  .to_logits = m.to_logits_data,
                                  .logits = logits.data()};
    const Scratch scratch(recurrence::scratch_bytes(p, executor.threads));
    recurrence::run(p, executor, scratch.get());
  }
  logits.expect_guards_intact("logits");
  std::vector<Row> out{logits.get()};
  for (std::size_t i = states.size() - layers.size(); i < states.size(); ++i) {
    states[i].expect_guards_intact("state");
    out.push_back(states[i].get());
  }
  return out;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](auto change) { change(all.emplace_back()); };
  add([](Case&) {});
  add([](Case& c) { c.post_norm = true; });
  add([](Case& c) { c.dim = 13, c.inner = 37, c.hidden = 5, c.tokens = 1; });
  add([](Case& c) { c.dim = 65, c.inner = 1, c.hidden = 131, c.tokens = 70, c.post_norm = true; });
  add([](Case& c) { c.sub_norm = true, c.gates = false; });
  add([](Case& c) { c.gates = c.out = false; });
  add([](Case& c) { c.sigmoid = true; });
  add([](Case& c) { c.sigmoid = c.normalize = c.post_norm = c.sub_norm = true; });
  add([](Case& c) { c.layers = 0; });
  add([](Case& c) { c.layers = 0, c.post_norm = true; });
  return all;
}

constexpr int kSteps = 3;

/// Some 200 roundings of the accumulation type one after the other, which norms magnify a few
/// times. A wrong formula errs by a thousand times as much.
Tolerance of_sums(DType dtype) { return {1000 * half_ulp(accumulation(dtype)), 0}; }

TEST(TransformerStep, EqualsTheDefinition) {
  for (const auto& target : recurrence::cpu::targets()) {
    recurrence::cpu::force_target(target);
    for (const DType dtype :
         {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      int index = 0;
      for (Case c : cases()) {
        c.dtype = dtype;
        Model model(c);
        const std::vector<Row> got = run_steps(model, kSteps, threads(2));
        Row logits;
        for (int step = 0; step < kSteps; ++step) logits = logits_of(model);
        std::vector<Row> expected{logits};
        for (const Layer& layer : model.layers) {
          Row& state = expected.emplace_back();
          for (const Complex& h : layer.state) {
            state.push_back(h.real());
            if (!c.sigmoid) state.push_back(h.imag());
          }
        }
        for (std::size_t i = 0; i < got.size(); ++i) {
          Tolerance tolerance = of_sums(dtype);
          if (i == 0) tolerance.relative = half_ulp(dtype);  // logits are stored in dtype
          expect_near(got[i], expected[i], tolerance,
                      target + " " + name(dtype) + " case " + std::to_string(index) +
                          (i == 0 ? " logits" : " state " + std::to_string(i - 1)));
        }
        ++index;
      }
    }
  }
  recurrence::cpu::force_target("");
}

TEST(TransformerStep, IsTheSameForAnyNumberOfThreads) {
  for (const Case& c : cases()) {
    Model model(c);
    const auto one = run_steps(model, kSteps, threads(1));
    // A host that runs its bodies one after the other, or fewer threads than it promised.
    recurrence::Executor alone;
    alone.threads = 3;
    for (const recurrence::Executor& executor : {threads(2), threads(3), threads(7), alone}) {
      const auto many = run_steps(model, kSteps, executor);
      for (std::size_t i = 0; i < one.size(); ++i)
        expect_same_bits(one[i], many[i], std::to_string(executor.threads) + " threads");
    }
  }
}

TEST(TransformerStep, TakesRowsOfZerosAndHugeValues) {
  for (const double size : {0.0, 1e15}) {
    Model model({});
    Weights token(DType::kFloat32, 1);
    model.embedding_data = token.draw(model.embedding, model.c.dim, size);
    const Row got = run_steps(model, 1, threads(1))[0];
    expect_near(got, logits_of(model), of_sums(DType::kFloat32), "of " + std::to_string(size));
  }
}

TEST(TransformerStep, RefusesWhatItCannotRead) {
  recurrence::TransformerStep p;
  p.dim = p.inner = p.hidden = p.tokens = 4;
  p.dtype = DType::kComplex64;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.dtype = DType::kFloat32;
  p.hidden = 0;
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
  p.hidden = 4;
  p.inner = 5;
  const recurrence::TransformerLayer without_out{};
  p.layers = {&without_out, 1};
  EXPECT_THROW(recurrence::run(p, {}, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::testing
