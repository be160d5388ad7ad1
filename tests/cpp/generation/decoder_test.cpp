#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gateloop/generation.h"
#include "models.h"

namespace gateloop::generation {
namespace {

constexpr std::int64_t kBatch = 2, kLength = 37;  // a prime: no chunk divides it

/// Largest difference of a channel of (..., channels), relative to its largest value: a small
/// channel cannot hide. In double precision a different order of sums leaves 1e-14 of the largest
/// channel; data-dependent positions divide by products as small as 1e-10 (the reference's clamp)
/// and keep 1e-9.
double difference(const torch::Tensor& got, const torch::Tensor& expected) {
  const auto largest = [](const torch::Tensor& t) { return t.abs().flatten(0, -2).amax(0); };
  return (largest(got - expected) / largest(expected)).max().item<double>();
}
constexpr double kTolerance = 1e-8;

/// The same of a few rows in low precision, where a channel is one number that may be near zero:
/// relative to the largest logit.
double row_difference(const torch::Tensor& got, const torch::Tensor& expected) {
  return ((got - expected).abs().max() / expected.abs().max()).item<double>();
}

torch::Tensor some_ids() {
  torch::manual_seed(2);
  return torch::randint(256, {kBatch, kLength}, torch::kInt64);
}

/// ids (B, T), one token after the other -> logits (B, T, num_tokens).
torch::Tensor read_each(Decoder& decoder, const torch::Tensor& ids) {
  std::vector<torch::Tensor> logits;
  for (const auto& id : ids.split(1, 1)) logits.push_back(decoder.read(id));
  return torch::stack(logits, 1);
}

class EveryKind : public testing::TestWithParam<test::Kind> {
 protected:
  nn::Transformer model = test::make_model(GetParam().options);
  torch::Tensor ids = some_ids();
  torch::Tensor whole() {
    const torch::NoGradGuard no_grad;
    return model->forward(ids);  // (B, T, num_tokens)
  }
  torch::Tensor steps(Decoder& decoder, std::int64_t first) const {
    return read_each(decoder, ids.narrow(1, first, kLength - first));
  }
};

TEST_P(EveryKind, StepByStepGivesTheFullForward) {
  for (const std::int64_t batch : {kBatch, std::int64_t{1}}) {  // one sequence is one operator
    ids = ids.narrow(0, 0, batch);
    const auto expected = whole();
    Decoder decoder(model);
    EXPECT_LT(difference(steps(decoder, 0), expected), kTolerance) << batch << " sequences";
    EXPECT_EQ(decoder.position(), kLength);
  }
}

TEST_P(EveryKind, PrefillInChunksGivesOneShot) {
  const auto expected = whole().select(1, -1);
  for (const std::int64_t chunk : {1, 5, 36, 37, 1024}) {
    Decoder decoder(model, chunk);
    EXPECT_LT(difference(decoder.read(ids), expected), kTolerance) << "chunks of " << chunk;
  }
}

TEST_P(EveryKind, PrefillThenStepsGivesTheFullForward) {
  const auto expected = whole();
  Decoder decoder(model);
  decoder.read(ids.narrow(1, 0, 20));
  EXPECT_LT(difference(steps(decoder, 20), expected.narrow(1, 20, kLength - 20)), kTolerance);
}

TEST_P(EveryKind, TwoContinuationsOfOnePrefixAreTwoRuns) {
  for (const std::int64_t batch : {kBatch, std::int64_t{1}}) {
    ids = ids.narrow(0, 0, batch);
    const auto others = 255 - ids;
    // In two parts: after the second a cache has room, which both continuations could write to.
    const auto read_prefix = [&](Decoder& decoder) {
      decoder.read(ids.narrow(1, 0, 9));
      decoder.read(ids.narrow(1, 9, 1));
    };
    const auto alone = [&](const torch::Tensor& text) {
      Decoder decoder(model);
      read_prefix(decoder);
      std::vector<torch::Tensor> logits;
      for (std::int64_t t = 10; t < 20; ++t) logits.push_back(decoder.read(text.narrow(1, t, 1)));
      return torch::stack(logits);
    };
    Decoder decoder(model);
    read_prefix(decoder);
    auto one = decoder.state(), two = decoder.state();
    std::vector<torch::Tensor> ones, twos;
    const auto read = [&](DecoderState& state, const torch::Tensor& id) {
      decoder.set_state(std::move(state));
      auto logits = decoder.read(id);
      state = decoder.state();
      return logits;
    };
    for (std::int64_t t = 10; t < 20; ++t) {
      ones.push_back(read(one, ids.narrow(1, t, 1)));
      twos.push_back(read(two, others.narrow(1, t, 1)));
    }
    EXPECT_EQ(one.position, 20);
    EXPECT_TRUE(torch::stack(ones).equal(alone(ids)));
    EXPECT_TRUE(torch::stack(twos).equal(alone(others)));
    Decoder copy = decoder;
    EXPECT_TRUE(copy.read(ids.narrow(1, 0, 1)).equal(decoder.read(ids.narrow(1, 0, 1))));
  }
}

TEST_P(EveryKind, AStateContinuesInTheModel) {
  const auto expected = whole().select(1, -1);
  Decoder decoder(model);
  decoder.read(ids.narrow(1, 0, 20));
  auto state = decoder.state();
  // With gradients: a state is no tensor of inference mode.
  const auto logits = model->forward(ids.narrow(1, 20, kLength - 20), &state.layers);
  EXPECT_LT(difference(logits.select(1, -1).detach(), expected), kTolerance);
}

TEST_P(EveryKind, GenerateDrawsWhatTheFullForwardWould) {
  // The slow definition: all tokens again through the model for each new one.
  const GenerateOptions options{.length = 12, .sampling = {}, .seed = 5};
  Sampler sample(options.sampling, options.seed);
  auto text = ids.narrow(1, 0, 9);
  for (std::int64_t i = 0; i < options.length; ++i) {
    const torch::NoGradGuard no_grad;
    text = torch::cat({text, sample(model->forward(text).select(1, -1)).unsqueeze(1)}, 1);
  }
  Decoder decoder(model, 4);
  EXPECT_TRUE(generate(decoder, ids.narrow(1, 0, 9), options).equal(text.narrow(1, 9, 12)));
}

TEST_P(EveryKind, StateSizeIsWhatTheDecoderHolds) {
  Decoder decoder(model);
  decoder.read(ids);
  const auto size = model::state_size(model::resolve(GetParam().options), 8);
  const auto needed = kBatch * (size.fixed + kLength * size.per_token);
  if (size.per_token == 0) {
    EXPECT_EQ(decoder.state_bytes(), needed);
    decoder.read(ids.repeat({1, 10}));
    EXPECT_EQ(decoder.state_bytes(), needed) << "the state grew with the text";
  } else {
    EXPECT_GE(decoder.state_bytes(), needed);  // a cache keeps room to grow
  }
}

INSTANTIATE_TEST_SUITE_P(Decoder, EveryKind, testing::ValuesIn(test::all_kinds()),
                         [](const auto& info) { return info.param.name; });

TEST(StateSize, OfTheReferencesEnwik8Model) {
  nn::TransformerOptions options;  // dim 512, depth 6, a head per channel
  EXPECT_EQ(model::state_size(model::resolve(options)).fixed, 6 * 512 * 8);
  EXPECT_EQ(model::state_size(model::resolve(options), 2).fixed,
            6 * 512 * 8);  // the state stays float32
  options.use_gate_looped_attn = false;
  EXPECT_EQ(model::state_size(model::resolve(options)).per_token, 6 * 2 * 8 * 64 * 4);
}

TEST(Generate, SeedsReproduce) {
  const auto model = test::make_model(test::small_options());
  const auto run = [&](std::uint64_t seed) {
    Decoder decoder(model);
    return generate(decoder, some_ids(), {.length = 64, .sampling = {}, .seed = seed});
  };
  EXPECT_TRUE(run(1).equal(run(1)));
  EXPECT_FALSE(run(1).equal(run(2)));
}

TEST(Generate, HandsOverEachTokenAndStopsWhenAsked) {
  const auto model = test::make_model(test::small_options());
  Decoder decoder(model);
  std::vector<torch::Tensor> seen;
  const auto drawn = generate(decoder, some_ids(), {.length = 50, .sampling = {}, .seed = 1},
                              [&](const torch::Tensor& tokens) {
                                seen.push_back(tokens);
                                return seen.size() < 3;
                              });
  ASSERT_EQ(drawn.sizes(), (std::vector<std::int64_t>{kBatch, 3}));
  EXPECT_TRUE(drawn.equal(torch::stack(seen, 1)));
}

TEST(Generate, LengthZeroDrawsNothing) {
  Decoder decoder(test::make_model(test::small_options()));
  const auto drawn = generate(decoder, some_ids(), {.length = 0, .sampling = {}, .seed = 1});
  EXPECT_EQ(drawn.sizes(), (std::vector<std::int64_t>{kBatch, 0}));
}

TEST(Decoder, SequencesTogetherGetWhatEachGetsAlone) {
  // Together they read packed weights, which exist in float32; alone they do not.
  torch::manual_seed(1);
  for (const auto& kind : test::all_kinds()) {
    nn::Transformer model(kind.options);
    const auto ids = some_ids();
    Decoder together(model);
    together.read(ids);
    const auto got = together.read(ids.narrow(1, 0, 1));
    for (std::int64_t i = 0; i < kBatch; ++i) {
      Decoder alone(model);
      alone.read(ids.narrow(0, i, 1));
      const auto expected = alone.read(ids.narrow(0, i, 1).narrow(1, 0, 1));
      EXPECT_LT(row_difference(got.narrow(0, i, 1), expected), 1e-4) << kind.name;
    }
  }
}

TEST(Decoder, RefusesWeightsThatHaveChanged) {
  const auto ids = some_ids();
  using Model = nn::Transformer;
  const auto layer = [](Model& model, const std::string& name) {
    return model->named_modules("", false)[name];
  };
  const std::vector<std::function<void(Model&)>> changes = {
      [](Model& model) { model->parameters().back().mul_(1.5); },
      [](Model& model) { model->to(torch::kBFloat16); },
      [](Model& model) {
        model->parameters().front().set_data(torch::randn({256, 16}));
      },
      [&](Model& model) {
        auto& weight = layer(model, "layers.0.1.fn.0")->as<torch::nn::Linear>()->weight;
        weight = weight + 1;
      },
      [&](Model& model) {
        auto& weight = layer(model, "token_emb")->as<torch::nn::Embedding>()->weight;
        weight = weight + 1;
      }};
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < changes.size(); ++i) {
    for (const std::int64_t batch : {kBatch, std::int64_t{1}}) {
      SCOPED_TRACE("change " + std::to_string(i));
      torch::manual_seed(1);
      Model model(test::small_options());
      const auto text = ids.narrow(0, 0, batch);
      Decoder decoder(model);
      const auto before = decoder.read(text.narrow(1, 0, 1));
      changes[i](model);
      EXPECT_THROW(decoder.read(text.narrow(1, 1, 1)), std::logic_error);
      // Another one reads what the model's layers read.
      const auto after = Decoder(model).read(text.narrow(1, 0, 1)).to(torch::kFloat);
      const auto expected = model->forward(text.narrow(1, 0, 1)).select(1, -1).to(torch::kFloat);
      // Float32: 2^-24 a rounding, some hundred of them. bfloat16: see below.
      EXPECT_LT((after - expected).norm().item<double>(),
                (i == 1 ? 0.05 : 1e-5) * expected.norm().item<double>());
      EXPECT_GT((after - before).abs().max().item<double>(), 1e-4);
    }
  }
}

TEST(Decoder, GivesTheSameWhateverItReadBefore) {
  torch::manual_seed(1);
  for (const auto& kind : test::all_kinds()) {
    nn::Transformer model(kind.options);
    const auto ids = some_ids();
    const auto alone = [&](Decoder& decoder) {
      decoder.read(ids.narrow(0, 0, 1));
      return decoder.read(ids.narrow(0, 1, 1).narrow(1, 0, 1));
    };
    Decoder first(model), used(model);
    used.read(ids);  // packs the matrices
    used.set_state({});
    EXPECT_TRUE(alone(used).equal(alone(first))) << kind.name;
  }
}

TEST(Decoder, RefusesAStateOfAnotherDepth) {
  auto options = test::small_options();
  Decoder two(test::make_model(options));
  options.depth = 3;
  Decoder three(test::make_model(options));
  three.read(some_ids());
  EXPECT_THROW(two.set_state(three.state()), std::invalid_argument);
}

TEST(Decoder, Bfloat16WeightsKeepTheStateInFloat32) {
  torch::manual_seed(1);
  nn::Transformer model(test::small_options());
  const auto ids = some_ids();
  Decoder exact(model);
  const auto expected = exact.read(ids);
  model->to(torch::kBFloat16);
  Decoder decoder(model, 5);
  const auto got = decoder.read(ids).to(torch::kFloat32);
  EXPECT_EQ(decoder.state_bytes(), exact.state_bytes());
  // bfloat16 keeps 8 bits: 2^-9 a rounding, a dozen of them one after the other through two layers.
  EXPECT_LT(row_difference(got, expected), 0.05);
}

TEST(Decoder, RefusesIdsItCannotRead) {
  Decoder decoder(test::make_model(test::small_options()));
  EXPECT_THROW(decoder.read(torch::zeros({3}, torch::kInt64)), std::invalid_argument);
  EXPECT_THROW(decoder.read(torch::zeros({1, 0}, torch::kInt64)), std::invalid_argument);
  EXPECT_THROW(decoder.read(torch::zeros({1, 3})), std::invalid_argument);
  EXPECT_THROW(decoder.read(torch::full({1, 1}, 256, torch::kInt64)), c10::Error);
  EXPECT_THROW(decoder.read(torch::full({1, 1}, -1, torch::kInt64)), c10::Error);
  decoder.read(torch::zeros({2, 3}, torch::kInt64));
  EXPECT_THROW(decoder.read(torch::zeros({1, 3}, torch::kInt64)), std::invalid_argument);
  EXPECT_THROW(Decoder(test::make_model(test::small_options()), 0), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::generation
