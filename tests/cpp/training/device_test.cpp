/// Training on a device without code in the library (tests/cpp/ops/fake_device.cpp).
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gateloop/checkpoint.h"
#include "gateloop/evaluation.h"
#include "gateloop/nn/runtime_model.h"
#include "gateloop/nn/transformer.h"
#include "gateloop/training.h"
#include "small_run.h"
#include "small_trainer.h"
#include "temporary_directory.h"
#include "training/stopwatch.h"
#include "training/trainer.h"

namespace gateloop::training {
namespace {

using nlohmann::json;
using test::losses_of;
using test::TemporaryDirectory;

constexpr double kTolerance = 1e-4;  // of float32, after some steps

/// Numbers that differ by rounding alone; all else is equal.
void expect_alike(const json& there, const json& here, const std::string& where) {
  if (here.is_number_float()) {
    const auto expected = here.get<double>();
    EXPECT_NEAR(there.get<double>(), expected, kTolerance * std::max(1.0, std::abs(expected)))
        << where;
    return;
  }
  if (!here.is_structured()) {
    EXPECT_EQ(there, here) << where;
    return;
  }
  ASSERT_EQ(there.size(), here.size()) << where;
  for (const auto& [key, value] : here.items()) {
    expect_alike(here.is_array() ? there[std::stoul(key)] : there.at(key), value,
                 where + "/" + key);
  }
}

void expect_alike(const std::vector<std::string>& there, const std::vector<std::string>& here) {
  ASSERT_EQ(there.size(), here.size());
  for (std::size_t i = 0; i < here.size(); ++i) {
    expect_alike(json::parse(there[i]), json::parse(here[i]), "line " + std::to_string(i));
  }
}

class DeviceTest : public ::testing::Test {
 protected:
  DeviceTest() {
    test::write_bytes(dir_ / "text", test::small_text(20'000));
    corpus_.emplace(dir_ / "text");
    config_.model.depth = 3;
    config_.model.layer_pattern = "gate_loop,attention";
    config_.model.window = 8;
    config_.model.simple_gate_loop = model::SimpleGateLoopSpec{};
    TrainingOptions& options = config_.training;
    options.device = "cpu";
    options.steps = 8;
    options.optimizer = "adamw";
    options.weight_decay = 0.1;
    options.validate_every = 4;
    options.sample_every = 4;
    options.diagnostics_every = 4;
  }

  /// The likeliest bytes after some of the text, one by one, in the log beside the losses.
  static std::optional<Sample> sample(nn::Transformer& model, std::int64_t /*step*/) {
    nn::ModuleReader reader(model);
    std::string text = "the gate ";
    std::vector<std::int64_t> ids(text.begin(), text.end());
    for (int i = 0; i < 8; ++i) {
      const auto logits = reader.prefill(ids);
      ids = {std::max_element(logits.begin(), logits.end()) - logits.begin()};
      text.push_back(static_cast<char>(ids[0]));
    }
    return Sample{"the gate ", text};
  }

  /// Goes on from the state in the directory, if there is one, on the fake device.
  void train_there(RunConfig config, const std::filesystem::path& dir) {
    torch::manual_seed(config.training.seed);
    nn::Transformer model(config.model);
    model->to(torch::Device(torch::kHPU, 0));
    std::filesystem::create_directories(dir);
    Trainer trainer(std::move(config), model, *corpus_, dir, sample, steady_seconds, {});
    trainer.run();
    for (const auto& parameter : model->parameters()) {
      EXPECT_EQ(parameter.device().type(), torch::kHPU);
    }
  }

  TemporaryDirectory dir_;
  std::optional<Corpus> corpus_;
  RunConfig config_ = test::small_config();
};

TEST_F(DeviceTest, TrainsAsOnTheCpu) {
  train(config_, *corpus_, dir_ / "here", Start::kNew, sample);
  train_there(load_config(dir_ / "here"), dir_ / "there");
  expect_alike(losses_of(dir_ / "there"), losses_of(dir_ / "here"));
}

TEST_F(DeviceTest, AStateGoesOnOnTheOtherDevice) {
  train(config_, *corpus_, dir_ / "whole", Start::kNew, sample);
  RunConfig half = config_;
  half.training.steps = 4;
  train(half, *corpus_, dir_ / "begun here", Start::kNew, sample);
  train_there(load_config(dir_ / "begun here"), dir_ / "begun there");
  for (const char* name : {"begun here", "begun there"}) {
    RunConfig more = load_config(dir_ / name);
    more.training.steps = 8;
    if (name == std::string("begun here")) {
      train_there(more, dir_ / name);
    } else {
      train(more, *corpus_, dir_ / name, Start::kResume, sample);
    }
    expect_alike(json::parse(losses_of(dir_ / name).back()),
                 json::parse(losses_of(dir_ / "whole").back()), name);
  }
}

TEST_F(DeviceTest, EvaluatesAsOnTheCpu) {
  train(config_, *corpus_, dir_ / "run", Start::kNew);
  nn::Transformer model = checkpoint::load_model(dir_ / "run", checkpoint::Weights::kLatest);
  EvaluationOptions windows;
  windows.length = 24;
  const auto scores = [&] {
    nn::ModuleReader reader(model);
    return std::vector<double>{
        evaluate_windows(model, corpus_->valid(), windows).bits_per_byte(),
        runtime::evaluate(reader, corpus_->valid().first(500), {}).bits_per_byte()};
  };
  const std::vector<double> here = scores();
  model->to(torch::Device(torch::kHPU, 0));
  const std::vector<double> there = scores();
  for (std::size_t i = 0; i < here.size(); ++i) EXPECT_NEAR(there[i], here[i], kTolerance);
}

}  // namespace
}  // namespace gateloop::training
