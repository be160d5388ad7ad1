// The three forms of GateLoop (arXiv 2311.01927, section 3) give one y: recurrent, scan, surrogate
// attention.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "compare.h"
#include "gateloop/ops.h"

namespace forms_test {

using torch::Tensor;

constexpr std::int64_t kBatch = 2, kTime = 19, kChannels = 5;
constexpr double kTolerance = 1e-13;  // float64, sums in another order

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

  for (const char* form : {"auto", "scan", "attention", "recurrent"}) {
    const auto y = std::get<0>(gateloop::gate_loop(q, k, v, a, std::nullopt, false, {}, {}, form));
    expect_close(y, surrogate, kTolerance);
  }

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

// ---- gate_loop of heads: every form beside a loop over the steps
// ----------------------------------

struct Heads {
  const char* name;
  bool is_complex = false, per_key = false, taylor = false;
  std::int64_t keys = 3, values = 4;
};

struct Layout {
  const char* name;
  bool reverse = false, initial = false, padded = false;
  std::vector<std::int64_t> cuts = {};
};

/// Longer than a tile of attention (128 steps), than two chunks of a scan (64), than a block of
/// steps (13) and of none a multiple.
constexpr std::int64_t kSteps = 150;

/// 1, x_i, x_i²/√2 and the products of two channels.
Tensor features_of(const Tensor& x) {
  std::vector<Tensor> all = {torch::ones_like(x.narrow(-1, 0, 1)), x, x.square() / std::sqrt(2.0)};
  for (std::int64_t i = 1; i < x.size(-1); ++i) {
    all.push_back(x.narrow(-1, i, 1) * x.narrow(-1, 0, i));
  }
  return torch::cat(all, -1);
}

/// Step after step of sequences (B, T, H, ...); a transition holds for a key, or for all of a head.
std::tuple<Tensor, Tensor> by_loop(const std::vector<Tensor>& in, Tensor state, bool reverse) {
  const std::int64_t time = in[0].size(1);
  std::vector<Tensor> ys(static_cast<std::size_t>(time));
  for (std::int64_t s = 0; s < time; ++s) {
    const std::int64_t t = reverse ? time - 1 - s : s;
    const auto q = in[0].select(1, t), k = in[1].select(1, t), v = in[2].select(1, t);
    const auto a = in[3].select(1, t);
    const auto decay = a.dim() == k.dim() ? a.unsqueeze(-1) : a.unsqueeze(-1).unsqueeze(-1);
    state = decay * state + k.unsqueeze(-1) * v.unsqueeze(-2);
    const auto read = state.is_complex() ? torch::real(state) : state;
    ys[static_cast<std::size_t>(t)] = (q.unsqueeze(-1) * read).sum(-2);
  }
  return {time == 0 ? in[2] : torch::stack(ys, 1), state};
}

class GateLoopForms : public testing::TestWithParam<std::tuple<Heads, Layout>> {
 protected:
  GateLoopForms() : heads_(std::get<0>(GetParam())), layout_(std::get<1>(GetParam())) {
    // Tensors this small gain nothing from a second thread. Waiting for it on a busy machine made
    // the tests take 171 s in place of 9.
    torch::set_num_threads(1);
    torch::manual_seed(7);
    const std::int64_t batch = layout_.cuts.empty() ? 2 : 1;
    const auto real = [](std::vector<std::int64_t> sizes) {
      return torch::randn(sizes, torch::kDouble);
    };
    const std::vector<std::int64_t> of_keys = {batch, kSteps, 2, heads_.keys};
    const auto of_head = heads_.per_key ? of_keys : std::vector<std::int64_t>{batch, kSteps, 2};
    auto a = 1 - torch::rand(of_head, torch::kDouble).pow(4);
    a.slice(1, 0, kSteps, 7) = 0;
    if (heads_.is_complex) a = torch::polar(a, 6 * torch::rand(of_head, torch::kDouble));
    inputs_ = {real(of_keys), real(of_keys), real({batch, kSteps, 2, heads_.values}), a};
    const std::int64_t keys = heads_.taylor ? features_of(inputs_[0]).size(-1) : heads_.keys;
    const std::int64_t rows = layout_.cuts.empty() ? batch : std::ssize(layout_.cuts) - 1;
    inputs_.push_back(torch::randn({rows, 2, keys, heads_.values}, a.options()));
    if (!layout_.initial) inputs_[4].zero_();
    for (auto& input : inputs_) input.requires_grad_();
    if (layout_.padded) mask_ = torch::rand({batch, kSteps}) > 0.3;
    if (!layout_.cuts.empty()) cu_seqlens_ = torch::tensor(layout_.cuts);
  }

  ~GateLoopForms() override { torch::set_num_threads(threads_); }

  /// Every sequence alone, without its padding.
  std::tuple<Tensor, Tensor> expected() {
    std::vector<Tensor> in(inputs_.begin(), inputs_.end() - 1), ys, states;
    if (heads_.taylor) in = {features_of(in[0]), features_of(in[1]), in[2], in[3]};
    const auto at = [&](const auto& part) {
      return std::vector<Tensor>{part(in[0]), part(in[1]), part(in[2]), part(in[3])};
    };
    for (std::int64_t n = 0; n < inputs_[4].size(0); ++n) {
      const auto state = inputs_[4].narrow(0, n, 1);
      if (cu_seqlens_) {
        const auto which = static_cast<std::size_t>(n);
        const std::int64_t begin = layout_.cuts[which], end = layout_.cuts[which + 1];
        const auto [y, last] =
            by_loop(at([&](const Tensor& t) { return t.narrow(1, begin, end - begin); }), state,
                    layout_.reverse);
        ys.push_back(y);
        states.push_back(last);
        continue;
      }
      const auto places = mask_ ? (*mask_)[n].nonzero().flatten() : torch::arange(kSteps);
      const auto [y, last] =
          by_loop(at([&](const Tensor& t) { return t.narrow(0, n, 1).index_select(1, places); }),
                  state, layout_.reverse);
      ys.push_back(torch::zeros_like(inputs_[2].narrow(0, n, 1)).index_copy(1, places, y));
      states.push_back(last);
    }
    return {torch::cat(ys, cu_seqlens_ ? 1 : 0), torch::cat(states)};
  }

  std::tuple<Tensor, Tensor> in_form(const char* form) {
    std::optional<Tensor> state;
    if (layout_.initial) state = inputs_[4];
    return gateloop::gate_loop(inputs_[0], inputs_[1], inputs_[2], inputs_[3], state,
                               layout_.reverse, cu_seqlens_, mask_, form,
                               heads_.taylor ? "taylor" : "none");
  }

  std::vector<Tensor> gradients(const std::tuple<Tensor, Tensor>& results) {
    const auto& [y, last] = results;
    const auto weights = [](const Tensor& t) {
      return torch::cos(torch::arange(t.numel(), torch::kDouble)).view(t.sizes());
    };
    const auto flat = last.is_complex() ? torch::view_as_real(last) : last;
    const auto loss = (y * weights(y)).sum() + (flat * weights(flat)).sum();
    const std::vector<Tensor> wanted(inputs_.begin(), inputs_.end() - (layout_.initial ? 0 : 1));
    return torch::autograd::grad({loss}, wanted);
  }

  const int threads_ = torch::get_num_threads();
  const Heads heads_;
  const Layout layout_;
  std::vector<Tensor> inputs_;  // q, k, v, a, the initial state
  std::optional<Tensor> mask_, cu_seqlens_;
};

TEST_P(GateLoopForms, AreTheLoopOverSteps) {
  const auto theirs = expected();
  const auto their_gradients = gradients(theirs);
  for (const char* form : {"auto", "scan", "attention", "recurrent"}) {
    SCOPED_TRACE(form);
    const auto ours = in_form(form);
    expect_close(std::get<0>(ours), std::get<0>(theirs), kTolerance);
    expect_close(std::get<1>(ours), std::get<1>(theirs), kTolerance);
    const auto our_gradients = gradients(ours);
    for (std::size_t i = 0; i < our_gradients.size(); ++i) {
      SCOPED_TRACE(i);
      expect_close(our_gradients[i], their_gradients[i], kTolerance);
    }
    const torch::NoGradGuard no_grad;
    const auto alone = in_form(form);
    expect_close(std::get<0>(alone), std::get<0>(theirs), kTolerance);
  }
}

TEST_P(GateLoopForms, AStepIsOneOfTheLoop) {
  const torch::NoGradGuard no_grad;
  const auto at = [&](std::size_t i) { return inputs_[i].select(1, 0); };
  const auto state = inputs_[4].narrow(0, 0, inputs_[0].size(0));
  const auto [y, last] = gateloop::gate_loop_step(at(0), at(1), at(2), at(3), state,
                                                  heads_.taylor ? "taylor" : "none");
  std::vector<Tensor> first;
  for (std::size_t i = 0; i < 4; ++i) {
    const auto step = inputs_[i].narrow(1, 0, 1);
    first.push_back(heads_.taylor && i < 2 ? features_of(step) : step);
  }
  const auto [expected_y, expected_last] = by_loop(first, state, false);
  expect_close(y, expected_y.squeeze(1), kTolerance);
  expect_close(last, expected_last, kTolerance);
}

const std::vector<std::int64_t> kRagged = {0, 0, 15, 80, 80, 144, 150, 150};

INSTANTIATE_TEST_SUITE_P(
    Heads, GateLoopForms,
    testing::Combine(
        testing::Values(Heads{.name = "Real"}, Heads{.name = "Complex", .is_complex = true},
                        Heads{.name = "OfOneChannel", .is_complex = true, .keys = 1, .values = 1},
                        Heads{.name = "PerKey", .per_key = true},
                        Heads{.name = "ComplexPerKey", .is_complex = true, .per_key = true},
                        Heads{.name = "Taylor", .taylor = true},
                        Heads{.name = "ComplexTaylor", .is_complex = true, .taylor = true}),
        testing::Values(Layout{.name = "Whole"},
                        Layout{.name = "ReverseFromAState", .reverse = true, .initial = true},
                        Layout{.name = "Ragged", .initial = true, .cuts = kRagged},
                        Layout{.name = "RaggedReverse", .reverse = true, .cuts = kRagged},
                        Layout{.name = "Padded", .initial = true, .padded = true},
                        Layout{.name = "PaddedReverse", .reverse = true, .padded = true})),
    [](const auto& info) {
      return std::string(std::get<0>(info.param).name) + std::get<1>(info.param).name;
    });

}  // namespace forms_test
