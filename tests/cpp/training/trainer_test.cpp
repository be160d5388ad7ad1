#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <csignal>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>

#include "gateloop/checkpoint.h"
#include "gateloop/evaluation.h"
#include "gateloop/training.h"
#include "small_run.h"
#include "small_trainer.h"
#include "temporary_directory.h"

namespace gateloop::training {
namespace {

using test::losses_of;
using test::read_bytes;
using test::TemporaryDirectory;

std::optional<Sample> stop(nn::Transformer&, std::int64_t) { throw std::runtime_error("stop"); }

/// One a step, of the lines of a log.
std::vector<double> numbers_of(const std::vector<std::string>& lines, const char* field) {
  std::vector<double> numbers;
  for (const auto& line : lines) numbers.push_back(nlohmann::json::parse(line)[field]);
  return numbers;
}

/// Losses and norms of two runs whose sums differ in their order alone. A mean of equal means is
/// the mean; float32 sums in another order differ by 1e-7, which Adam's division by small moments
/// magnifies over 12 steps.
void expect_alike(const std::vector<std::string>& got, const std::vector<std::string>& expected) {
  for (const char* field : {"train_bits_per_byte", "gradient_norm"}) {
    const auto numbers = numbers_of(got, field), wanted = numbers_of(expected, field);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      EXPECT_NEAR(numbers[i], wanted[i], 1e-3 * wanted[i]) << field << " at step " << i + 1;
    }
    EXPECT_NEAR(numbers[0], wanted[0], 1e-5 * wanted[0]) << field;
  }
}

/// Small runs on a corpus of its own.
class TrainerTest : public ::testing::Test {
 protected:
  TrainerTest() {
    test::write_bytes(dir_ / "text", test::small_text(20'000));
    corpus_.emplace(dir_ / "text");
    TrainingOptions& options = config_.training;
    options.schedule = "cosine";
    options.validate_every = 5;
    options.sample_every = 0;
  }

  std::string message_of(const std::function<void()>& action) {
    try {
      action();
    } catch (const std::exception& error) {
      return error.what();
    }
    return "no error";
  }

  /// The losses, rates and norms of a run into a directory of its own.
  std::vector<std::string> run(const std::string& name, const RunConfig& config) {
    train(config, *corpus_, dir_ / name, Start::kNew);
    return losses_of(dir_ / name);
  }

  TemporaryDirectory dir_;
  std::optional<Corpus> corpus_;
  RunConfig config_ = test::small_config();
};

TEST_F(TrainerTest, CheckpointedBlocksTrainTheSame) {
  config_.training.threads = 2;
  config_.training.length = 64;  // in both cases enough for two replicas
  for (const char* dtype : {"float32", "bfloat16"}) {
    config_.training.dtype = dtype;
    config_.training.checkpoint_blocks = false;
    const auto whole = run(std::string("whole ") + dtype, config_);
    config_.training.checkpoint_blocks = true;
    EXPECT_EQ(run(std::string("checkpointed ") + dtype, config_), whole) << dtype;
  }
}

TEST_F(TrainerTest, FixedTransitionsAreLearnedAndSeeNoText) {
  config_.training.fixed_transitions = true;
  config_.model.gate = model::Gate::kSigmoid;
  config_.model.transition_bias = std::pair{0.0, 2.0};
  const auto transitions = [&](const std::string& name, const char* part) {
    std::vector<torch::Tensor> found;
    for (const auto& [key, tensor] :
         checkpoint::state_dict(*checkpoint::load_model(dir_ / name, checkpoint::Weights::kLatest)))
      if (key.ends_with(std::string("to_a.0.") + part)) found.push_back(tensor.flatten());
    return torch::cat(found);
  };
  const auto whole = run("whole", config_);
  EXPECT_EQ(transitions("whole", "weight").numel(), 2 * 16 * 16);
  EXPECT_TRUE(transitions("whole", "weight").eq(0).all().item<bool>());
  config_.training.steps = 1;
  config_.training.schedule = "constant";
  run("first", config_);
  EXPECT_FALSE(torch::equal(transitions("whole", "bias"), transitions("first", "bias")));
  config_.training.steps = 12;
  run("constant", config_);
  RunConfig more = load_config(dir_ / "first");
  more.training.steps = 12;
  train(more, *corpus_, dir_ / "first", Start::kResume);
  EXPECT_EQ(losses_of(dir_ / "first").back(), losses_of(dir_ / "constant").back());
  more.training.fixed_transitions = false;
  const std::string refused =
      message_of([&] { train(more, *corpus_, dir_ / "first", Start::kResume); });
  EXPECT_NE(refused.find("a run with another fixed_transitions:"), std::string::npos) << refused;
}

TEST_F(TrainerTest, FixedTransitionsNeedAGateLoop) {
  config_.training.fixed_transitions = true;
  config_.model.use_gate_looped_attn = false;
  EXPECT_EQ(message_of([&] { run("run", config_); }),
            "fixed_transitions: the model has no GateLoop layer");
}

TEST_F(TrainerTest, LearnsAndLeavesEveryFile) {
  config_.training.steps = 60;
  config_.training.validate_every = 20;
  const Result result = train(config_, *corpus_, dir_ / "run", Start::kNew);
  EXPECT_EQ(result.step, 60);
  EXPECT_EQ(result.signal, 0);
  EXPECT_EQ(result.final_bytes, 999);           // all of the validation part but its first byte
  EXPECT_LT(*result.final_bits_per_byte, 4.5);  // 8 at first
  for (const char* file : {"config.json", "model.safetensors", "model.best.safetensors",
                           "training_state.safetensors", "metrics.jsonl"}) {
    EXPECT_TRUE(std::filesystem::exists(dir_ / "run" / file)) << file;
  }
  const auto lines = losses_of(dir_ / "run");
  ASSERT_EQ(lines.size(), 60U);
  const auto first = nlohmann::json::parse(lines[0]);
  for (const char* field : {"step", "train_bits_per_byte", "learning_rate", "gradient_norm"}) {
    EXPECT_TRUE(first.contains(field)) << field;
  }
  EXPECT_NEAR(first["train_bits_per_byte"].get<double>(), 8, 0.8);
  EXPECT_FALSE(first.contains("validation_bits_per_byte"));
  EXPECT_TRUE(nlohmann::json::parse(lines[19]).contains("validation_bits_per_byte"));
  const auto last = nlohmann::json::parse(lines[59]);
  EXPECT_EQ(last["final_validation_bits_per_byte"].get<double>(), *result.final_bits_per_byte);
}

TEST_F(TrainerTest, TheWeightsSavedAreThoseValidated) {
  config_.training.sample_every = 5;
  std::map<std::int64_t, std::map<std::string, torch::Tensor>> sampled;  // by step
  const Result result = train(config_, *corpus_, dir_ / "run", Start::kNew,
                              [&](nn::Transformer& model, std::int64_t step) {
                                sampled[step] = checkpoint::state_dict(*model);
                                return std::nullopt;
                              });
  const auto lines = losses_of(dir_ / "run");
  const auto check = [&](checkpoint::Weights weights, std::int64_t step) {
    nn::Transformer model = checkpoint::load_model(dir_ / "run", weights);
    const auto saved = checkpoint::state_dict(*model);
    ASSERT_EQ(saved.size(), sampled.at(step).size());
    for (const auto& [name, tensor] : sampled.at(step)) {
      EXPECT_TRUE(torch::equal(saved.at(name), tensor)) << name;
    }
    EvaluationOptions evaluation;
    evaluation.length = config_.training.length;
    evaluation.windows = config_.training.validation_windows;
    const auto line = nlohmann::json::parse(lines.at(static_cast<std::size_t>(step - 1)));
    EXPECT_EQ(evaluate_windows(model, corpus_->valid(), evaluation).bits_per_byte(),
              line.at("validation_bits_per_byte").get<double>());
  };
  ASSERT_GT(result.best_step, 0);
  check(checkpoint::Weights::kBest, result.best_step);
  check(checkpoint::Weights::kLatest, result.step);
}

TEST_F(TrainerTest, TheSameSeedGivesTheSameRunAndAnotherAnother) {
  const auto first = run("a", config_);
  EXPECT_EQ(run("b", config_), first);
  config_.training.seed = 1;
  EXPECT_NE(run("c", config_), first);
}

TEST_F(TrainerTest, ResumesBitForBitAfterASignal) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    config_.training.dtype = dtype;
    const std::string whole = std::string("whole.") + dtype;
    const std::string broken = std::string("broken.") + dtype;
    const auto unbroken = run(whole, config_);
    config_.training.sample_every = 6;
    const Result stopped = train(config_, *corpus_, dir_ / broken, Start::kNew,
                                 [](nn::Transformer&, std::int64_t) -> std::optional<Sample> {
                                   std::raise(SIGTERM);
                                   return std::nullopt;
                                 });
    EXPECT_EQ(stopped.signal, SIGTERM);
    EXPECT_EQ(stopped.step, 6);
    EXPECT_FALSE(stopped.final_bits_per_byte);
    EXPECT_EQ(losses_of(dir_ / broken).size(), 6U);
    train(load_config(dir_ / broken), *corpus_, dir_ / broken, Start::kResume);
    EXPECT_EQ(losses_of(dir_ / broken), unbroken) << dtype;
    EXPECT_EQ(read_bytes(dir_ / broken / "model.safetensors"),
              read_bytes(dir_ / whole / "model.safetensors"));
    config_.training.sample_every = 0;
  }
}

TEST_F(TrainerTest, ResumesFromTheCheckpointAndDropsLaterLines) {
  const auto unbroken = run("whole", config_);
  config_.training.sample_every = 6;
  // An error before step 6 is in the log; the last checkpoint is of step 4.
  EXPECT_EQ(message_of([&] { train(config_, *corpus_, dir_ / "broken", Start::kNew, stop); }),
            "stop");
  EXPECT_EQ(losses_of(dir_ / "broken").size(), 5U);
  std::ofstream(dir_ / "broken" / "metrics.jsonl", std::ios::app) << "{\"step\": 6, \"tra";
  train(load_config(dir_ / "broken"), *corpus_, dir_ / "broken", Start::kResume);
  EXPECT_EQ(losses_of(dir_ / "broken"), unbroken);
}

TEST_F(TrainerTest, HeadsOfEveryKindLearnAndResumeBitForBit) {
  const std::map<std::string, std::function<void(nn::TransformerOptions&)>> kinds = {
      {"dim_key", [](auto& o) { o.gate_loop_dim_key = 8; }},
      {"per_key", [](auto& o) { o.per_key_transitions = true; }},
      {"taylor", [](auto& o) { o.feature_map = model::FeatureMap::kTaylor; }}};
  for (const auto& [kind, change] : kinds) {
    SCOPED_TRACE(kind);
    RunConfig config = config_;
    config.model.gate_loop_heads = 4;
    change(config.model);
    const auto unbroken = run("whole " + kind, config);
    const auto losses = numbers_of(unbroken, "train_bits_per_byte");
    EXPECT_LT(losses.back(), losses.front() - 1);
    config.training.sample_every = 6;
    const std::filesystem::path broken = dir_ / ("broken " + kind);
    // The last checkpoint is of step 4.
    EXPECT_EQ(message_of([&] { train(config, *corpus_, broken, Start::kNew, stop); }), "stop");
    train(load_config(broken), *corpus_, broken, Start::kResume);
    EXPECT_EQ(losses_of(broken), unbroken);
    EXPECT_EQ(read_bytes(broken / "model.safetensors"),
              read_bytes(dir_ / ("whole " + kind) / "model.safetensors"));
  }
}

TEST_F(TrainerTest, TheLogHasEverySampleAsText) {
  config_.training.sample_every = 5;
  // Invalid: a byte that continues nothing, and a character cut short. U+2028 ends a line for some.
  const std::string bytes = "\x80 \xe2\x80\xa8\n\"\x01 \xc3\xa9 \xe2\x80";
  const std::string text = "\uFFFD \u2028\n\"\u0001 \u00e9 \uFFFD";
  const SampleCallback sample = [&](nn::Transformer&, std::int64_t step) {
    // The state may be saved only after the record.
    EXPECT_EQ(std::ssize(losses_of(dir_ / "run")), step - 1);
    return Sample{"prime " + std::to_string(step), bytes};
  };
  train(config_, *corpus_, dir_ / "run", Start::kNew, sample);
  const std::string log = read_bytes(dir_ / "run" / "metrics.jsonl");
  EXPECT_TRUE(std::ranges::all_of(log, [](char c) { return c == '\n' || (c >= ' ' && c < 0x7f); }));
  const auto lines = losses_of(dir_ / "run");
  ASSERT_EQ(lines.size(), 12U);
  for (std::size_t step = 1; step <= lines.size(); ++step) {
    const auto line = nlohmann::json::parse(lines[step - 1]);
    const bool sampled = step == 5 || step == 10 || step == 12;
    ASSERT_EQ(line.contains("sample"), sampled) << step;
    if (!sampled) continue;
    EXPECT_EQ(line["sample"], text) << step;
    EXPECT_EQ(line["sample_prime"], "prime " + std::to_string(step));
  }
}

TEST_F(TrainerTest, SamplesOfAResumedRunAreThoseOfTheUnbroken) {
  config_.training.sample_every = 3;
  const SampleCallback sample = [](nn::Transformer& model, std::int64_t) {
    return Sample{"", std::to_string(model->parameters().front().sum().item<float>())};
  };
  train(config_, *corpus_, dir_ / "whole", Start::kNew, sample);
  const auto unbroken = losses_of(dir_ / "whole");
  EXPECT_EQ(message_of([&] {
              train(config_, *corpus_, dir_ / "broken", Start::kNew,
                    [&](nn::Transformer& model, std::int64_t step) {
                      return step == 9 ? stop(model, step) : sample(model, step);
                    });
            }),
            "stop");
  train(load_config(dir_ / "broken"), *corpus_, dir_ / "broken", Start::kResume, sample);
  EXPECT_EQ(losses_of(dir_ / "broken"), unbroken);
}

TEST_F(TrainerTest, TheLastStepIsSavedBeforeItsValidationOfTheWhole) {
  const SampleCallback sample = [](nn::Transformer&, std::int64_t) { return Sample{"a", "b"}; };
  train(config_, *corpus_, dir_ / "whole", Start::kNew, sample);
  const auto unbroken = losses_of(dir_ / "whole");
  ASSERT_TRUE(nlohmann::json::parse(unbroken.back()).contains("final_validation_bits_per_byte"));
  // The only sample is that of the end.
  EXPECT_EQ(message_of([&] { train(config_, *corpus_, dir_ / "broken", Start::kNew, stop); }),
            "stop");
  EXPECT_EQ(losses_of(dir_ / "broken").size(), 11U);
  const std::string weights = read_bytes(dir_ / "whole" / "model.safetensors");
  EXPECT_EQ(read_bytes(dir_ / "broken" / "model.safetensors"), weights);
  for (int i = 0; i < 2; ++i) {  // once more, it has nothing to add
    const Result ended = train(load_config(dir_ / "broken"), *corpus_, dir_ / "broken",
                               Start::kResume, i == 0 ? sample : stop);
    EXPECT_EQ(ended.signal, 0);
    EXPECT_EQ(ended.final_bytes, 999);
    EXPECT_EQ(losses_of(dir_ / "broken"), unbroken);
  }
  EXPECT_EQ(read_bytes(dir_ / "broken" / "model.safetensors"), weights);
}

TEST_F(TrainerTest, ASignalAtTheLastStepIsAnswered) {
  config_.training.checkpoint_every = 11;
  const SampleCallback sample = [](nn::Transformer&, std::int64_t) { return Sample{"a", "b"}; };
  train(config_, *corpus_, dir_ / "whole", Start::kNew, sample);
  const auto in_last_step = [&] {
    if (std::filesystem::exists(dir_ / "broken" / "training_state.safetensors"))
      std::raise(SIGTERM);
    return 0.0;
  };
  const Result stopped =
      train(config_, *corpus_, dir_ / "broken", Start::kNew, sample, in_last_step);
  EXPECT_EQ(stopped.signal, SIGTERM);
  EXPECT_EQ(stopped.step, 12);
  EXPECT_FALSE(stopped.final_bits_per_byte);
  train(load_config(dir_ / "broken"), *corpus_, dir_ / "broken", Start::kResume, sample);
  EXPECT_EQ(losses_of(dir_ / "broken"), losses_of(dir_ / "whole"));
}

TEST_F(TrainerTest, ResumesFromTheSeedWhereNothingWasSaved) {
  const auto unbroken = run("whole", config_);
  config_.training.sample_every = 2;
  EXPECT_EQ(message_of([&] { train(config_, *corpus_, dir_ / "broken", Start::kNew, stop); }),
            "stop");
  EXPECT_FALSE(std::filesystem::exists(dir_ / "broken" / "training_state.safetensors"));
  train(load_config(dir_ / "broken"), *corpus_, dir_ / "broken", Start::kResume);
  EXPECT_EQ(losses_of(dir_ / "broken"), unbroken);
}

/// A clock that advances at each reading, half as fast from `change` seconds on: a machine whose
/// speed doubles.
Clock faster_from(double change) {
  return
      [change, now = std::make_shared<double>(0)] { return *now += *now < change ? 0.02 : 0.01; };
}

TEST_F(TrainerTest, MinutesEndInTimeAndThePlanRepeatsTheRun) {
  config_.training.steps.reset();
  config_.training.minutes = 0.2;
  config_.training.warmup_steps = 20;
  const Clock clock = faster_from(6);
  train(config_, *corpus_, dir_ / "timed", Start::kNew, {}, clock);
  EXPECT_NEAR(clock(), 12, 0.02 * 12);
  const auto timed = losses_of(dir_ / "timed");
  const RunConfig stored = load_config(dir_ / "timed");
  EXPECT_GE(stored.training.plan.size(), 2U);
  EXPECT_EQ(stored.training.plan.back().steps, std::ssize(timed));
  for (const PlannedLength& planned : stored.training.plan) {  // the log holds the plan too
    const auto line = nlohmann::json::parse(timed.at(static_cast<std::size_t>(planned.step - 1)));
    EXPECT_EQ(line.at("planned_steps"), planned.steps);
  }

  config_.training.minutes.reset();
  config_.training.plan = stored.training.plan;
  EXPECT_EQ(run("repeated", config_), timed);
  EXPECT_EQ(read_bytes(dir_ / "repeated" / "model.safetensors"),
            read_bytes(dir_ / "timed" / "model.safetensors"));
}

TEST_F(TrainerTest, AResumedRunKeepsItsPlan) {
  config_.training.steps.reset();
  config_.training.minutes = 0.2;
  config_.training.checkpoint_every = 50;
  config_.training.sample_every = 120;
  // An error after step 120: config.json and the state are of step 100.
  EXPECT_EQ(message_of(
                [&] { train(config_, *corpus_, dir_ / "run", Start::kNew, stop, faster_from(2)); }),
            "stop");
  const auto before = load_config(dir_ / "run").training.plan;
  ASSERT_GE(before.size(), 2U);
  train(load_config(dir_ / "run"), *corpus_, dir_ / "run", Start::kResume, {}, faster_from(0));
  const RunConfig stored = load_config(dir_ / "run");
  ASSERT_GE(stored.training.plan.size(), before.size());
  for (std::size_t i = 0; i < before.size(); ++i) EXPECT_EQ(stored.training.plan[i], before[i]);

  config_.training.minutes.reset();
  config_.training.sample_every = 0;
  config_.training.plan = stored.training.plan;
  EXPECT_EQ(run("repeated", config_), losses_of(dir_ / "run"));
}

TEST_F(TrainerTest, MicroBatchesTogetherAndOneByOneAgree) {
  const std::int64_t rows = config_.training.batch * config_.training.accumulation;
  config_.training.rows_per_pass = rows;
  const auto together = run("together", config_);
  for (const std::int64_t rows_per_pass : {std::int64_t{2}, std::int64_t{1}}) {
    config_.training.rows_per_pass = rows_per_pass;
    expect_alike(run("looped" + std::to_string(rows_per_pass), config_), together);
  }
}

TEST_F(TrainerTest, ThreadsTakeRowsOfTheirOwn) {
  config_.training.length = 32;  // one row is enough for a thread
  const auto one = run("one thread", config_);
  config_.training.threads = 2;
  const auto two = run("two threads", config_);
  // Three parts: both threads, then one.
  config_.training.batch = 3;
  config_.training.accumulation = 1;
  config_.training.threads = 1;
  const auto three_rows = run("three rows", config_);
  config_.training.threads = 2;
  config_.training.rows_per_pass = 2;
  const auto in_rounds = run("in rounds", config_);
  expect_alike(two, one);
  expect_alike(in_rounds, three_rows);
}

TEST_F(TrainerTest, TwoThreadsRepeatAndResumeBitForBit) {
  config_.training.threads = 2;
  config_.training.length = 32;
  config_.model.layer_pattern = "gate_loop,attention";
  std::string lines;
  for (int i = 0; i < 1'000; ++i) {
    lines += R"({"text": "Mary had )" + std::to_string(i * i) + " lambs\"}\n";
  }
  test::write_bytes(dir_ / "lines.jsonl", lines);
  for (const bool documents : {false, true}) {
    // Full attention reads documents row by row: weights are cast several times a pass.
    if (documents) {
      corpus_.emplace(
          corpus::Sources{.paths = {dir_ / "lines.jsonl"}, .field = "text", .documents = true});
    }
    for (const char* dtype : {"float32", "bfloat16"}) {
      config_.training.dtype = dtype;
      const std::string name = std::string(dtype) + (documents ? " documents" : "");
      const auto unbroken = run(name, config_);
      EXPECT_EQ(run(name + " again", config_), unbroken) << name;
      config_.training.sample_every = 6;
      EXPECT_THROW(train(config_, *corpus_, dir_ / (name + " broken"), Start::kNew, stop),
                   std::runtime_error);
      config_.training.sample_every = 0;
      train(load_config(dir_ / (name + " broken")), *corpus_, dir_ / (name + " broken"),
            Start::kResume);
      EXPECT_EQ(losses_of(dir_ / (name + " broken")), unbroken) << name;
    }
  }
}

TEST_F(TrainerTest, ANonFiniteLossStopsAndKeepsTheCheckpoint) {
  config_.training.sample_every = 8;
  train(config_, *corpus_, dir_ / "run", Start::kNew,
        [](nn::Transformer&, std::int64_t step) -> std::optional<Sample> {
          if (step == 8) std::raise(SIGINT);
          return std::nullopt;
        });
  const std::filesystem::path state = dir_ / "run" / "training_state.safetensors";
  // A weight that is infinite: every loss from here on is not finite.
  auto content = checkpoint::load_safetensors(state);
  for (auto& [name, tensor] : content.tensors) {
    if (name == "model.token_emb.weight") tensor.fill_(std::numeric_limits<float>::infinity());
  }
  checkpoint::save_safetensors(state, content);
  const std::string before = read_bytes(state);
  const std::string message =
      message_of([&] { train(load_config(dir_ / "run"), *corpus_, dir_ / "run", Start::kResume); });
  EXPECT_NE(message.find("the loss is not finite at step 9"), std::string::npos) << message;
  EXPECT_NE(message.find("is whole"), std::string::npos) << message;
  EXPECT_EQ(read_bytes(state), before);
  EXPECT_EQ(losses_of(dir_ / "run").size(), 8U);
}

TEST_F(TrainerTest, InfiniteWeightsDoNotReplaceACheckpoint) {
  config_.training.schedule = "constant";
  config_.training.warmup_steps = 0;
  config_.training.learning_rate = 1e39;  // beyond float32
  config_.training.checkpoint_every = 1;
  const std::string message =
      message_of([&] { train(config_, *corpus_, dir_ / "run", Start::kNew); });
  EXPECT_NE(message.find("is not finite at step 1"), std::string::npos) << message;
  EXPECT_NE(message.find("no checkpoint had been saved"), std::string::npos) << message;
  EXPECT_FALSE(std::filesystem::exists(dir_ / "run" / "training_state.safetensors"));
}

TEST_F(TrainerTest, InfiniteWeightsAreNotSampledFrom) {
  config_.training.schedule = "constant";
  config_.training.warmup_steps = 0;
  config_.training.learning_rate = 1e39;  // beyond float32
  config_.training.sample_every = 1;
  EXPECT_NE(message_of([&] {
              train(config_, *corpus_, dir_ / "run", Start::kNew, stop);
            }).find("a weight is not finite at step 1"),
            std::string::npos);
}

TEST_F(TrainerTest, RefusesWhatDoesNotFitTheDirectory) {
  run("run", config_);
  EXPECT_NE(message_of([&] {
              train(config_, *corpus_, dir_ / "run", Start::kNew);
            }).find("holds a run already"),
            std::string::npos);

  RunConfig other = load_config(dir_ / "run");
  other.model.dim = 32;
  const std::string before = read_bytes(dir_ / "run" / "training_state.safetensors");
  EXPECT_NE(
      message_of([&] { train(other, *corpus_, dir_ / "run", Start::kResume); }).find("another dim"),
      std::string::npos);

  test::write_bytes(dir_ / "other text", test::small_text(19'999));
  const Corpus other_corpus(dir_ / "other text");
  EXPECT_NE(message_of([&] {
              train(load_config(dir_ / "run"), other_corpus, dir_ / "run", Start::kResume);
            }).find("is not the corpus of this run"),
            std::string::npos);
  EXPECT_EQ(read_bytes(dir_ / "run" / "training_state.safetensors"), before);

  test::write_bytes(dir_ / "run" / "training_state.safetensors", before.substr(0, 1000));
  EXPECT_NE(message_of([&] {
              train(load_config(dir_ / "run"), *corpus_, dir_ / "run", Start::kResume);
            }).find("training_state.safetensors"),
            std::string::npos);

  const Result anew = train(config_, *corpus_, dir_ / "run", Start::kOverwrite);
  EXPECT_EQ(anew.step, 12);
  EXPECT_EQ(losses_of(dir_ / "run").size(), 12U);
}

TEST_F(TrainerTest, RefusesASecondTrainerInTheDirectory) {
  config_.training.sample_every = 2;
  std::string message;
  train(config_, *corpus_, dir_ / "run", Start::kNew, [&](nn::Transformer&, std::int64_t) {
    message = message_of(
        [&] { train(load_config(dir_ / "run"), *corpus_, dir_ / "run", Start::kResume); });
    return std::nullopt;
  });
  EXPECT_NE(message.find("another process is training there"), std::string::npos) << message;
}

TEST_F(TrainerTest, RefusesATextShorterThanAWindow) {
  config_.training.length = 1000;  // the validation part holds 1000 bytes; a window needs 1001
  EXPECT_NE(message_of([&] {
              train(config_, *corpus_, dir_ / "run", Start::kNew);
            }).find("a window needs 1001"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(dir_ / "run"));
}

TEST_F(TrainerTest, RefusesModelOptionsThatDoNotFit) {
  config_.model.gate_loop_heads = 3;
  EXPECT_NE(message_of([&] {
              train(config_, *corpus_, dir_ / "run", Start::kNew);
            }).find("heads must divide"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(dir_ / "run"));
}

}  // namespace
}  // namespace gateloop::training
