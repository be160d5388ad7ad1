// The three forms of GateLoop (arXiv 2311.01927, section 3) give one y: recurrent, scan, surrogate
// attention.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <optional>
#include <vector>

#include "compare.h"
#include "gateloop/ops.h"

namespace forms_test {

using torch::Tensor;

constexpr std::int64_t kBatch = 2, kTime = 19, kChannels = 5;
constexpr double kTolerance = 1e-12;  // float64, sums in another order

struct Forms : testing::Test {
  Forms() {
    torch::manual_seed(5);
    const auto sequence = [](std::int64_t channels) {
      return torch::randn({kBatch, kTime, channels}, torch::kDouble);
    };
    q = sequence(kChannels), k = sequence(kChannels), v = sequence(kChannels);
    z = sequence(2 * kChannels);
  }
  Tensor q, k, v, z;
};

/// Causal matrix of decays: entry (i, j) is a_i a_{i-1} ... a_{j+1}, (B, T, T, D).
Tensor decays(const Tensor& a) {
  const auto time = a.size(1);
  const auto matrix = torch::zeros({a.size(0), time, time, a.size(2)}, a.options());
  for (std::int64_t j = 0; j < time; ++j) {
    auto decay = torch::ones({a.size(0), a.size(2)}, a.options());
    for (std::int64_t i = j; i < time; ++i) {
      if (i > j) decay = decay * a.select(1, i);
      matrix.select(1, i).select(1, j).copy_(decay);
    }
  }
  return matrix;
}

Tensor surrogate_attention(const Tensor& q, const Tensor& x, const Tensor& a) {
  const auto weights = at::real(decays(a));  // (B, i, j, D)
  return q * (weights * x.unsqueeze(1)).sum(2);
}

TEST_F(Forms, GateLoop) {
  const auto complex = at::view_as_complex(z.unflatten(-1, {-1, 2}));
  const auto a = complex / complex.abs() * complex.abs().sigmoid();
  const auto surrogate = surrogate_attention(q, k * v, at::complex(at::real(a), at::imag(a)));

  const auto h = std::get<0>(gateloop::linear_recurrence(a, (k * v).to(torch::kComplexDouble)));
  expect_close(q * at::real(h), surrogate, kTolerance);

  expect_close(std::get<0>(gateloop::polar_gate_loop(q, k, v, z)), surrogate, kTolerance);

  std::vector<Tensor> steps;
  std::optional<Tensor> state;
  for (std::int64_t t = 0; t < kTime; ++t) {
    const auto at_step = [t](const Tensor& sequence) { return sequence.narrow(1, t, 1); };
    auto [y, next] =
        gateloop::polar_gate_loop(at_step(q), at_step(k), at_step(v), at_step(z), state);
    steps.push_back(y);
    state = next;
  }
  expect_close(torch::cat(steps, 1), surrogate, kTolerance);
}

TEST_F(Forms, SimpleGateLoop) {
  const auto gate = z.narrow(2, 0, kChannels), kv = k * v, a = gate.sigmoid();
  for (const bool normalize : {false, true}) {
    const auto x = normalize ? (1 - a) * kv : kv;
    const auto surrogate = surrogate_attention(q, x, a.to(torch::kComplexDouble));
    expect_close(q * std::get<0>(gateloop::linear_recurrence(a, x)), surrogate, kTolerance);
    expect_close(
        std::get<0>(gateloop::simple_gate_loop(q, kv, gate, std::nullopt, false, normalize)),
        surrogate, kTolerance);

    std::vector<Tensor> steps;
    std::optional<Tensor> state;
    for (std::int64_t t = 0; t < kTime; ++t) {
      const auto at_step = [t](const Tensor& sequence) { return sequence.narrow(1, t, 1); };
      auto [y, next] = gateloop::simple_gate_loop(at_step(q), at_step(kv), at_step(gate), state,
                                                  false, normalize);
      steps.push_back(y);
      state = next;
    }
    expect_close(torch::cat(steps, 1), surrogate, kTolerance);
  }
}

}  // namespace forms_test
