#include <gtest/gtest.h>

#include <stdexcept>

#include "gateloop/generation.h"
#include "models.h"

namespace gateloop::generation {
namespace {

constexpr std::int64_t kBatch = 2, kLength = 37;  // a prime: no chunk divides it

/// Largest difference relative to the largest logit. In double precision a different order of sums
/// leaves 1e-14; data-dependent positions divide by products as small as 1e-10 (the reference's
/// clamp) and keep 1e-9.
double difference(const torch::Tensor& got, const torch::Tensor& expected) {
  return ((got - expected).abs().max() / expected.abs().max()).item<double>();
}
constexpr double kTolerance = 1e-8;

torch::Tensor some_ids() {
  torch::manual_seed(2);
  return torch::randint(256, {kBatch, kLength}, torch::kInt64);
}

class EveryKind : public testing::TestWithParam<test::Kind> {
 protected:
  nn::Transformer model = test::make_model(GetParam().options);
  torch::Tensor ids = some_ids();
  torch::Tensor whole() {
    const torch::NoGradGuard no_grad;
    return model->forward(ids);  // (B, T, num_tokens)
  }
};

TEST_P(EveryKind, StepByStepGivesTheFullForward) {
  for (const std::int64_t batch : {kBatch, std::int64_t{1}}) {  // one sequence is one operator
    ids = ids.narrow(0, 0, batch);
    const auto expected = whole();
    Decoder decoder(model);
    for (std::int64_t t = 0; t < kLength; ++t)
      EXPECT_LT(difference(decoder.read(ids.narrow(1, t, 1)), expected.select(1, t)), kTolerance)
          << "step " << t << " of " << batch << " sequences";
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
  for (std::int64_t t = 20; t < kLength; ++t)
    EXPECT_LT(difference(decoder.read(ids.narrow(1, t, 1)), expected.select(1, t)), kTolerance)
        << "step " << t;
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
  const auto size = state_size(GetParam().options, torch::kFloat64);
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
  EXPECT_EQ(state_size(options).fixed, 6 * 512 * 8);
  EXPECT_EQ(state_size(options, torch::kBFloat16).fixed, 6 * 512 * 8);  // the state stays float32
  options.use_gate_looped_attn = false;
  EXPECT_EQ(state_size(options).per_token, 6 * 2 * 8 * 64 * 4);
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
      EXPECT_LT(difference(got.narrow(0, i, 1), expected), 1e-4) << kind.name;
    }
  }
}

TEST(Decoder, ANewOneReadsTheWeightsThatTheModelHasNow) {
  nn::Transformer model(test::small_options());
  const auto ids = some_ids();
  const auto before = Decoder(model).read(ids);
  {
    const torch::NoGradGuard no_grad;
    for (auto& weight : model->parameters()) weight.mul_(1.5);
  }
  const auto after = Decoder(model).read(ids);
  EXPECT_LT(difference(after, model->forward(ids).select(1, -1)), 1e-4);
  EXPECT_GT(difference(after, before), 0.1);
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
  EXPECT_LT(difference(got, expected), 0.05);
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
