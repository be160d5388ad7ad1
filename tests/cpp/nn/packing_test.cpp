// Packed and padded batches through the modules: the same as one sequence after the other.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>
#include <vector>

#include "compare.h"
#include "gateloop/nn.h"
#include "gateloop/ops.h"

namespace packing_test {

using namespace gateloop::nn;
using torch::Tensor;

// In float64 the two ways differ by the order of their sums only.
constexpr double kSameTolerance = 1e-12;
constexpr std::int64_t kDim = 8, kTokens = 11;
const std::vector<std::int64_t> kCuts = {0, 0, 1, 9, 14, 14, 23};

TransformerOptions options(const std::string& layers) {
  TransformerOptions o;
  o.dim = kDim;
  o.num_tokens = kTokens;
  o.depth = 3;
  o.heads = 2;
  o.dim_head = 4;
  o.layer_pattern = layers;
  return o;
}

std::vector<TransformerOptions> covering_options() {
  std::vector<TransformerOptions> all;
  for (const auto* layers : {"gate_loop", "attention", "gate_loop,attention,none"}) {
    all.push_back(options(layers));
  }
  all.push_back(options("gate_loop"));
  all.back().gate = Gate::kSigmoid;
  all.back().normalize_input = gateloop::model::NormalizeInput::kMean;
  all.back().simple_gate_loop = gateloop::model::SimpleGateLoopSpec{};
  all.push_back(options("gate_loop"));
  all.back().joint_kv = true;
  all.back().ablate_state_transition = true;
  all.push_back(options("gate_loop"));
  all.back().gate_loop_heads = 2;
  all.push_back(options("gate_loop"));
  all.back().gate = Gate::kMagnitudePhase;
  all.push_back(options("gate_loop"));
  all.back().gate_loop_heads = 2;
  all.back().gate_loop_dim_key = 4;
  all.back().per_key_transitions = true;
  all.push_back(options("gate_loop"));
  all.back().gate_loop_heads = 2;
  all.back().feature_map = gateloop::model::FeatureMap::kTaylor;
  all.push_back(options("attention"));
  all.back().rotary_emb = true;
  all.back().window = 3;
  all.push_back(options("attention"));
  all.back().data_dependent_rel_pos = true;
  all.back().window = 2;
  return all;
}

Transformer make(const TransformerOptions& o) {
  torch::manual_seed(0);
  Transformer model(o);
  model->to(torch::kDouble);
  return model;
}

Packing packed() { return {.cu_seqlens = torch::tensor(kCuts)}; }
Packing padded() {
  return {.mask = torch::tensor({{1, 0, 1, 1, 0, 0, 1, 1}, {0, 0, 0, 0, 1, 1, 0, 1}}) == 1};
}

/// The sequences of ids under this packing, each (1, T_n).
std::vector<Tensor> sequences(const Tensor& ids, const Packing& packing) {
  std::vector<Tensor> all;
  if (packing.mask) {
    for (std::int64_t b = 0; b < ids.size(0); ++b) {
      all.push_back(ids[b].index({(*packing.mask)[b]}).unsqueeze(0));
    }
    return all;
  }
  for (std::size_t n = 0; n + 1 < kCuts.size(); ++n) {
    all.push_back(ids.narrow(1, kCuts[n], kCuts[n + 1] - kCuts[n]));
  }
  return all;
}

struct Batch {
  Packing packing;
  Tensor ids;
};
std::vector<Batch> batches() {
  return {{packed(), torch::randint(kTokens, {1, 23})},
          {padded(), torch::randint(kTokens, {2, 8})}};
}

std::vector<Tensor> gradients(const Transformer& model, const Tensor& loss) {
  std::vector<Tensor> trained;
  for (const auto& p : model->parameters()) {
    if (p.requires_grad()) trained.push_back(p);
  }
  return torch::autograd::grad({loss}, trained, {}, /*retain_graph=*/true,
                               /*create_graph=*/false, /*allow_unused=*/true);
}

void expect_same_gradients(const Transformer& model, const Tensor& ours, const Tensor& theirs) {
  const auto mine = gradients(model, ours), others = gradients(model, theirs);
  for (std::size_t i = 0; i < mine.size(); ++i) {
    ASSERT_EQ(mine[i].defined(), others[i].defined());
    if (mine[i].defined()) expect_weights_close(mine[i], others[i], kSameTolerance);
  }
}

TEST(Packing, EqualsEachSequenceAlone) {
  for (const auto& o : covering_options()) {
    SCOPED_TRACE(o.layer_pattern);
    auto model = make(o);
    for (const auto& [packing, ids] : batches()) {
      const auto logits = model->forward(ids, nullptr, std::nullopt, packing);
      const auto ours = packing.mask ? logits.index({*packing.mask}) : logits[0];
      std::vector<Tensor> alone;
      for (const auto& each : sequences(ids, packing)) alone.push_back(model->forward(each)[0]);
      const auto theirs = torch::cat(alone);
      expect_close(ours, theirs, kSameTolerance);
      const auto weights = torch::randn_like(theirs);
      expect_same_gradients(model, (ours * weights).sum(), (theirs * weights).sum());
    }
  }
}

TEST(Packing, LossIsTheMeanOverAllSequences) {
  for (const auto& o : covering_options()) {
    SCOPED_TRACE(o.layer_pattern);
    auto model = make(o);
    for (const auto& [packing, ids] : batches()) {
      auto sum = torch::zeros({}, torch::kDouble);
      std::int64_t count = 0;
      for (const auto& each : sequences(ids, packing)) {
        const auto predicted = each.size(1) - 1;
        if (predicted < 1) continue;
        sum = sum + model->loss(each) * predicted;
        count += predicted;
      }
      const auto loss = model->loss(ids, std::nullopt, packing);
      expect_close(loss, sum / count, kSameTolerance);
      expect_same_gradients(model, loss, sum / count);
    }
  }
}

TEST(Packing, AStateGoesOn) {
  auto o = options("gate_loop");
  o.simple_gate_loop = gateloop::model::SimpleGateLoopSpec{};
  auto model = make(o);
  for (const auto& [packing, ids] : batches()) {
    const auto before = sequences(ids, packing);
    const auto count = static_cast<std::int64_t>(before.size());
    TransformerState state;
    model->forward(ids, &state, std::nullopt, packing);
    const auto more = torch::randint(kTokens, {count, 3});
    const auto logits = model->forward(more, &state);
    for (std::int64_t n = 0; n < count; ++n) {
      const auto whole = torch::cat({before[static_cast<std::size_t>(n)], more.narrow(0, n, 1)}, 1);
      const auto expected = model->forward(whole).narrow(1, whole.size(1) - 3, 3);
      expect_close(logits.narrow(0, n, 1), expected, kSameTolerance);
    }
  }
}

TEST(Packing, SimpleGateLoopLayer) {
  for (const bool reverse : {false, true}) {
    torch::manual_seed(0);
    SimpleGateLoopLayer layer(kDim, SimpleGateLoopLayerOptions{.reverse = reverse});
    layer->to(torch::kDouble);
    const auto x = torch::randn({1, 23, kDim}, torch::kDouble);
    std::vector<Tensor> alone;
    for (const auto& each : sequences(x, packed())) alone.push_back(layer->forward(each));
    expect_close(layer->forward_packed(x, packed()), torch::cat(alone, 1), kSameTolerance);
    const auto mask = *padded().mask;
    const auto y = layer->forward_packed(torch::randn({2, 8, kDim}, torch::kDouble), padded());
    EXPECT_TRUE(y.index({mask.logical_not()}).eq(0).all().item<bool>());
  }
}

template <class Call>
void expect_refused(const std::string& message, const Call& call) {
  try {
    call();
    ADD_FAILURE() << "taken: " << message;
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
  }
}

TEST(Packing, ErrorsNameTheModuleAndTheArgument) {
  auto model = make(options("attention"));
  const auto ids = torch::zeros({1, 23}, torch::kLong);
  const auto with = [&](const Tensor& x, const Packing& packing) {
    return [&model, x, packing] { model->forward(x, nullptr, std::nullopt, packing); };
  };
  expect_refused("Transformer: cu_seqlens must end with T = 22, got 23",
                 with(ids.narrow(1, 0, 22), packed()));
  expect_refused("Transformer: ids must be a batch of one", with(ids.expand({2, 23}), packed()));
  expect_refused("Transformer: mask must be (B, T) = [1, 23]", with(ids, padded()));
  expect_refused("Transformer: mask must be absent beside cu_seqlens",
                 with(ids, {packed().cu_seqlens, padded().mask}));
  expect_refused("CausalFullAttention: state must be null with cu_seqlens or mask", [&] {
    TransformerState state;
    model->forward(ids, &state, std::nullopt, packed());
  });
}

TEST(Packing, OperatorsTakeIt) {
  const auto z = torch::randn({1, 23, 2 * kDim}), q = torch::randn({1, 23, kDim});
  const auto cuts = packed().cu_seqlens;
  const auto [y, final_state] = gateloop::polar_gate_loop(q, q, q, z, {}, false, cuts);
  EXPECT_EQ(final_state.size(0), 6);
  const auto part = [](const Tensor& t) { return t.narrow(1, 9, 5); };
  const auto [alone, last] = gateloop::polar_gate_loop(part(q), part(q), part(q), part(z));
  EXPECT_TRUE(part(y).equal(alone));
  EXPECT_TRUE(final_state[3].equal(last[0]));
}

}  // namespace packing_test
