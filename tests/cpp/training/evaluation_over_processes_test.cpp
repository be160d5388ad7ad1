// Processes, threads here, that read one text together: the figure of one process.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "gateloop/evaluation.h"
#include "gateloop/nn/runtime_model.h"
#include "in_processes.h"
#include "models.h"

namespace gateloop::training {
namespace {

using test::in_processes;

constexpr std::uint8_t kCut = 'e';

std::vector<std::uint8_t> text_of_words(std::size_t size) {
  const std::string words = "the gate loops over time and forgets what it read long before; ";
  std::vector<std::uint8_t> text;
  for (std::size_t i = 0; text.size() < size; ++i) {
    text.push_back(static_cast<std::uint8_t>(words[i * i % words.size()]));
  }
  return text;
}

/// The options of a test's call; small, so that short texts are read in several blocks.
runtime::EvaluateOptions options_of(std::int64_t window, std::optional<std::uint8_t> separator) {
  return {.window = window, .separator = separator, .bytes_at_once = 8};
}

struct OverCase {
  std::string name;
  void (*change)(nn::TransformerOptions&);
};

class OverProcesses : public testing::TestWithParam<OverCase> {};

TEST_P(OverProcesses, TheFigureIsThatOfOne) {
  auto model_options = test::small_options();
  GetParam().change(model_options);
  std::vector<nn::Transformer> models;
  for (int rank = 0; rank < 3; ++rank) models.push_back(test::make_model(model_options));
  const runtime::Model saved = nn::runtime_model(models[0]);
  const bool divisible = model::has_bounded_state(saved.spec());
  for (const int size : {2, 3}) {
    in_processes(size, [&](const distributed::Communicator& communicator) {
      auto& model = models[static_cast<std::size_t>(communicator.rank())];
      for (const std::size_t bytes : {2, 3, 26, 97, 203}) {
        const auto text = text_of_words(bytes);
        for (const std::int64_t window : {0, 5, 40}) {
          for (const auto separator : {std::optional<std::uint8_t>(), std::optional(kCut)}) {
            runtime::Session session(saved, {.threads = 1});
            const auto options = options_of(window, separator);
            const auto expected = runtime::evaluate(session, text, options);
            int modules = 0;
            std::int64_t done = 0, total = 0;
            auto observed = options;
            observed.progress = [&](std::int64_t now, std::int64_t all) {
              EXPECT_GE(now, done);
              done = now, total = all;
            };
            const auto score = evaluate_over_processes(
                session, [&] { return ++modules, model; }, text, observed, communicator);
            EXPECT_EQ(score.bytes, expected.bytes);
            // Each byte's loss is rounded to 1e-7 of it, by two ways to the same state.
            EXPECT_NEAR(score.nats, expected.nats, 1e-5 * expected.nats);
            EXPECT_EQ(total, std::ssize(text) - 1);
            EXPECT_EQ(done, total);
            std::int64_t longest = 0;
            for (const auto& stretch : runtime::stretches(text, options)) {
              longest = std::max(longest, stretch.length);
            }
            EXPECT_EQ(modules, divisible && window == 0 && longest > 8 * size ? 1 : 0);
          }
        }
      }
    });
  }
}

TEST_P(OverProcesses, WhatOneRefusesAllRefuse) {
  auto model_options = test::small_options();
  GetParam().change(model_options);
  model_options.num_tokens = 100;
  auto model = test::make_model(model_options);
  const runtime::Model saved = nn::runtime_model(model);
  in_processes(2, [&](const distributed::Communicator& communicator) {
    runtime::Session session(saved, {.threads = 1});
    std::vector<std::uint8_t> text(50, 1);
    const auto evaluate = [&](const runtime::EvaluateOptions& options) {
      return evaluate_over_processes(
          session, [&] { return model; }, text, options, communicator);
    };
    EXPECT_THROW(evaluate(options_of(-1, {})), std::invalid_argument);
    text.back() = 100;
    EXPECT_THROW(evaluate(options_of(0, {})), std::invalid_argument);
    text.resize(1);
    EXPECT_THROW(evaluate(options_of(0, {})), std::invalid_argument);
  });
}

/// One process reads a window of 2.5 s, the other has nothing to read.
TEST(UnevenParts, NoneWaitsForALongPart) {
  constexpr std::chrono::seconds kTimeout(1);
  const runtime::Model saved = nn::runtime_model(test::make_model(test::small_options()));
  const auto evaluation = [&](std::size_t bytes) {
    return options_of(static_cast<std::int64_t>(bytes), {});
  };
  constexpr std::size_t kProbe = 4000;
  runtime::Session session(saved, {.threads = 1});
  const auto start = std::chrono::steady_clock::now();
  runtime::evaluate(session, text_of_words(kProbe), evaluation(kProbe));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  const auto text = text_of_words(static_cast<std::size_t>(kProbe * 2.5 / took.count()));
  in_processes(
      2,
      [&](const distributed::Communicator& communicator) {
        runtime::Session own(saved, {.threads = 1});
        int reports = 0;
        auto options = evaluation(text.size());
        options.progress = [&](std::int64_t, std::int64_t) { ++reports; };
        const auto modules = [] { return nn::Transformer(nullptr); };
        const auto score = evaluate_over_processes(own, modules, text, options, communicator);
        EXPECT_EQ(score.bytes, std::ssize(text) - 1);
        EXPECT_GT(reports, 1);
      },
      kTimeout);
}

TEST(WindowsOverProcesses, EachReadsItsPart) {
  constexpr std::int64_t kLength = 5;
  constexpr std::size_t kMost = 3;
  const auto text = text_of_words(203);
  std::vector<nn::Transformer> models;
  for (std::size_t i = 0; i < kMost; ++i) models.push_back(test::make_model(test::small_options()));
  // All windows, the last of two bytes; then some.
  for (const std::int64_t windows : {0, 7}) {
    const EvaluationOptions options{
        .length = kLength, .windows = windows, .bytes_per_pass = 10, .progress = {}};
    const auto expected = evaluate_windows(models[0], text, options);
    for (const int size : {2, 3}) {
      std::vector<std::int64_t> read(static_cast<std::size_t>(size));
      in_processes(size, [&](const distributed::Communicator& communicator) {
        const auto rank = static_cast<std::size_t>(communicator.rank());
        EvaluationOptions own = options;
        own.progress = [&](std::int64_t done, std::int64_t) { read[rank] = done; };
        const auto score = evaluate_windows(models[rank], text, own, communicator);
        EXPECT_EQ(score.bytes, expected.bytes);
        // Sums in another order, in double precision.
        EXPECT_NEAR(score.nats, expected.nats, 1e-10 * expected.nats);
      });
      EXPECT_EQ(std::accumulate(read.begin(), read.end(), std::int64_t{0}), expected.bytes);
      const auto [least, most] = std::minmax_element(read.begin(), read.end());
      EXPECT_LE(*most - *least, kLength);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, OverProcesses,
    testing::Values(OverCase{"MaxHeads", [](auto&) {}},
                    OverCase{"WideHeads", [](auto& o) { o.gate_loop_heads = 4; }},
                    OverCase{"SimpleGateLoop",
                             [](auto& o) {
                               o.gate = nn::Gate::kSigmoid;
                               o.simple_gate_loop.emplace();
                             }},
                    OverCase{"LocalAttention",
                             [](auto& o) {
                               o.layer_pattern = "gate_loop,attention";
                               o.window = 7;
                               o.rotary_emb = true;
                             }},
                    // More steps than a process reads of a block.
                    OverCase{"WideWindow",
                             [](auto& o) {
                               o.layer_pattern = "attention";
                               o.window = 30;
                               o.data_dependent_rel_pos = true;
                             }},
                    OverCase{"FullAttention", [](auto& o) { o.use_gate_looped_attn = false; }}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace gateloop::training
