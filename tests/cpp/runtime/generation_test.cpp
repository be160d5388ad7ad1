// The rules of the sampler, its draws, and the loop around a session.
#include "gateloop/generation.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>

#include "models.h"
#include "temporary_directory.h"

namespace gateloop::test {
namespace {

using generation::Sampler;
using generation::SamplingOptions;

std::vector<std::int64_t> draws(const SamplingOptions& options, const std::vector<float>& logits,
                                int count, std::uint64_t seed = 1) {
  Sampler sampler(options, seed);
  std::vector<std::int64_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(sampler.draw(logits, 1).front());
  return tokens;
}

std::set<std::int64_t> kinds(const SamplingOptions& options, const std::vector<float>& logits) {
  const auto tokens = draws(options, logits, 2000);
  return {tokens.begin(), tokens.end()};
}

TEST(Sampler, DrawsWithTheProbabilitiesOfTheLogits) {
  const std::vector<float> logits = {0, 1, 2, -1};
  const double temperature = 0.7;
  constexpr int kDraws = 40000;
  std::vector<int> counts(4);
  for (const auto token : draws({.temperature = temperature, .filter_thres = 0}, logits, kDraws))
    ++counts[static_cast<std::size_t>(token)];
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) / temperature);
  for (std::size_t i = 0; i < 4; ++i) {
    const double p = std::exp(static_cast<double>(logits[i]) / temperature) / sum;
    // Five standard deviations: one run in a million fails.
    EXPECT_NEAR(counts[i] / double{kDraws}, p, 5 * std::sqrt(p * (1 - p) / kDraws)) << i;
  }
}

TEST(Sampler, KeepsTheShareOfTheReference) {
  EXPECT_EQ(generation::kept_tokens(0.9, 256), 26);
  EXPECT_EQ(generation::kept_tokens(0.7, 10), 4);  // (1 - 0.7) 10 is 3.0000000000000004
  EXPECT_EQ(generation::kept_tokens(0, 10), 10);
  EXPECT_EQ(generation::kept_tokens(1, 10), 1);
}

TEST(Sampler, RulesLimitWhatCanBeDrawn) {
  const std::vector<float> logits = {0.0f, 0.3f, 0.2f, 0.1f, -0.5f};
  EXPECT_EQ(kinds({.filter_thres = 0}, logits), (std::set<std::int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(kinds({.filter_thres = 0.5}, logits), (std::set<std::int64_t>{1, 2, 3}));
  EXPECT_EQ(kinds({.filter_thres = 0, .top_k = 2}, logits), (std::set<std::int64_t>{1, 2}));
  EXPECT_EQ(kinds({.temperature = 0}, logits), (std::set<std::int64_t>{1}));
  // Probabilities 0.256, 0.231, 0.209, 0.189, 0.115 of tokens 1, 2, 3, 0, 4.
  EXPECT_EQ(kinds({.filter_thres = 0, .top_p = 0.4}, logits), (std::set<std::int64_t>{1, 2}));
  EXPECT_EQ(kinds({.filter_thres = 0, .top_p = 0.6}, logits), (std::set<std::int64_t>{1, 2, 3}));
  EXPECT_EQ(kinds({.filter_thres = 0, .min_p = 0.5}, logits), (std::set<std::int64_t>{0, 1, 2, 3}));
  EXPECT_EQ(kinds({.filter_thres = 0, .min_p = 1}, logits), (std::set<std::int64_t>{1}));
}

TEST(Sampler, PenalisesWhatWasReadAndDrawn) {
  const std::vector<float> logits = {2, 3, -1};
  Sampler sampler({.repetition_penalty = 2, .temperature = 0}, 0);
  sampler.read(std::vector<std::int64_t>{1}, 1);
  EXPECT_EQ(sampler.draw(logits, 1).front(), 0);  // 2 against 3 / 2
  EXPECT_EQ(sampler.draw(logits, 1).front(), 1);  // 2 / 2 against 3 / 2
  Sampler negative({.repetition_penalty = 2, .temperature = 0}, 0);
  negative.read(std::vector<std::int64_t>{0}, 1);
  EXPECT_EQ(negative.draw(std::vector<float>{-1, -1.5}, 1).front(), 1);  // -2 against -1.5
}

TEST(Sampler, RefusesIdsThatAreNoTokens) {
  Sampler sampler({.repetition_penalty = 2}, 0);
  const std::vector<std::int64_t> ended = {1, Sampler::kEnded};
  const std::vector<std::int64_t> huge = {std::int64_t{1} << 62};
  const std::vector<std::int64_t> three = {1, 2, 3};
  EXPECT_THROW(sampler.read(ended, 1), std::invalid_argument);
  EXPECT_THROW(sampler.read(huge, 1), std::invalid_argument);
  EXPECT_THROW(sampler.read(three, 2), std::invalid_argument);
}

TEST(Sampler, EndsEachSequenceAtItsStop) {
  Sampler sampler({.temperature = 0, .stop = {{2, 1}, {0, 0}}}, 0);
  const auto row = [](std::int64_t likeliest) {
    std::vector<float> logits(3, 0.0f);
    logits[static_cast<std::size_t>(likeliest)] = 1;
    return logits;
  };
  const auto draw = [&](std::int64_t first, std::int64_t second) {
    auto logits = row(first);
    for (const float logit : row(second)) logits.push_back(logit);
    return sampler.draw(logits, 2);
  };
  sampler.read(std::vector<std::int64_t>{0, 2}, 2);  // a prompt does not begin a stop
  EXPECT_EQ(draw(0, 1), (std::vector<std::int64_t>{0, 1}));
  EXPECT_FALSE(sampler.ended());
  EXPECT_EQ(draw(0, 2), (std::vector<std::int64_t>{0, 2}));
  EXPECT_EQ(draw(1, 1), (std::vector<std::int64_t>{Sampler::kEnded, 1}));
  EXPECT_TRUE(sampler.ended());
}

TEST(Sampler, SeedsDecide) {
  const std::vector<float> logits(50, 0.0f);
  EXPECT_EQ(draws({}, logits, 30, 5), draws({}, logits, 30, 5));
  EXPECT_NE(draws({}, logits, 30, 5), draws({}, logits, 30, 6));
}

TEST(Sampler, RefusesWhatDoesNotFit) {
  const auto refused = [](const SamplingOptions& options, const std::string& name) {
    try {
      Sampler(options, 0);
      ADD_FAILURE() << name;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("Sampler: " + name + " must be"), std::string::npos)
          << error.what();
    }
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  refused({.repetition_penalty = 0.5}, "repetition_penalty");
  refused({.temperature = -1}, "temperature");
  refused({.temperature = nan}, "temperature");
  refused({.filter_thres = 1.5}, "filter_thres");
  refused({.top_k = -1}, "top_k");
  refused({.top_p = 0}, "top_p");
  refused({.min_p = 2}, "min_p");
  refused({.stop = {{}}}, "stop");
  Sampler sampler({}, 0);
  EXPECT_THROW(sampler.draw(std::vector<float>(5), 2), std::invalid_argument);
  EXPECT_EQ(sampler.draw(std::vector<float>(6), 2).size(), 2U);
  EXPECT_THROW(sampler.draw(std::vector<float>(6), 3), std::invalid_argument);  // was of 2
  const float infinity = std::numeric_limits<float>::infinity();
  Sampler one({}, 0);
  EXPECT_THROW(one.draw(std::vector<float>{0, static_cast<float>(nan)}, 1), std::runtime_error);
  EXPECT_THROW(one.draw(std::vector<float>{0, infinity}, 1), std::runtime_error);
  EXPECT_EQ(one.draw(std::vector<float>{-infinity, 0}, 1).front(), 1);
}

class Generate : public testing::Test {
 protected:
  Generate() {
    std::mt19937_64 random(1);
    const model::ModelOptions options{.num_tokens = 20, .dim = 16, .depth = 2, .ff_mult = 2};
    auto weights = random_weights(model::resolve(options), random);
    write_model(dir.path(), options, weights);
    prompt = random_ids(model::resolve(options), 6, random);
  }
  runtime::Session session() const { return runtime::Session(runtime::Model(dir.path())); }
  TemporaryDirectory dir;
  std::vector<std::int64_t> prompt;
};

TEST_F(Generate, ReadsWhatItDrew) {
  auto one = session();
  std::vector<std::int64_t> text = prompt;
  for (int i = 0; i < 7; ++i) {
    auto anew = session();
    const auto logits = anew.prefill(text);
    text.push_back(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  const generation::GenerateOptions greedy{.length = 7, .sampling = {.temperature = 0}};
  const auto drawn = generation::generate(one, prompt, 1, greedy);
  EXPECT_EQ(drawn, std::vector(text.begin() + 6, text.end()));
}

TEST_F(Generate, SequencesOfABatchAreRows) {
  const generation::GenerateOptions greedy{.length = 5, .sampling = {.temperature = 0}};
  auto together = session();
  const auto rows = generation::generate(together, prompt, 2, greedy);
  for (std::size_t b = 0; b < 2; ++b) {
    auto alone = session();
    const auto drawn = generation::generate(alone, std::span(prompt).subspan(3 * b, 3), 1, greedy);
    EXPECT_TRUE(std::equal(drawn.begin(), drawn.end(), rows.begin() + 5 * static_cast<int>(b)));
  }
}

TEST_F(Generate, EndsWithAStopAndWhenTold) {
  auto one = session();
  const auto free = generation::generate(one, prompt, 1, {.length = 8});
  auto stopped = session();
  const auto cut =
      generation::generate(stopped, prompt, 1, {.length = 8, .sampling = {.stop = {{free[2]}}}});
  const auto first = std::find(free.begin(), free.end(), free[2]);
  EXPECT_EQ(cut, std::vector(free.begin(), first + 1));
  auto told = session();
  int calls = 0;
  const auto three =
      generation::generate(told, prompt, 1, {.length = 8}, [&](auto) { return ++calls < 3; });
  EXPECT_EQ(three, std::vector(free.begin(), free.begin() + 3));
  auto none = session();
  EXPECT_TRUE(generation::generate(none, prompt, 1, {.length = 0}).empty());
  EXPECT_THROW(generation::generate(none, prompt, 1, {.length = -1}), std::invalid_argument);
}

}  // namespace
}  // namespace gateloop::test
