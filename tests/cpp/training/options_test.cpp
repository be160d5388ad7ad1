#include <gtest/gtest.h>
#include <torch/cuda.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>

#include "gateloop/checkpoint.h"
#include "gateloop/training.h"
#include "model/file.h"
#include "model/machine.h"
#include "small_run.h"
#include "temporary_directory.h"
#include "training/device.h"
#include "training/memory.h"

namespace gateloop::training {
namespace {

using test::TemporaryDirectory;

TEST(Presets, Enwik8IsTheReferencesScript) {
  const RunConfig config = preset("enwik8");
  EXPECT_EQ(config.training.steps, 100'000);
  EXPECT_EQ(config.training.batch, 4);
  EXPECT_EQ(config.training.accumulation, 4);
  EXPECT_EQ(config.training.length, 256);
  EXPECT_EQ(config.training.optimizer, "adam");
  EXPECT_EQ(config.training.learning_rate, 1e-4);
  EXPECT_EQ(config.training.beta1, 0.9);
  EXPECT_EQ(config.training.beta2, 0.99);
  EXPECT_EQ(config.training.epsilon, 1e-8);
  EXPECT_EQ(config.training.weight_decay, 0);
  EXPECT_EQ(config.training.clip, 0.5);
  EXPECT_EQ(config.training.schedule, "constant");
  EXPECT_EQ(config.training.warmup_steps, 0);
  EXPECT_EQ(config.training.dtype, "float32");
  EXPECT_EQ(config.training.validate_every, 100);
  EXPECT_EQ(config.training.sample_every, 500);
  EXPECT_EQ(config.training.sample_prime, 128);
  EXPECT_EQ(config.training.sample_length, 512);
  nn::TransformerOptions expected;
  expected.gate_loop_heads = 512;
  expected.post_ln_norm = true;
  EXPECT_EQ(model::to_json(config.model), model::to_json(expected));
}

TEST(Presets, AllPassTheChecksAndUnknownOnesAreNamed) {
  for (const std::string& name : preset_names()) {
    EXPECT_NO_THROW(check(preset(name))) << name;
    EXPECT_EQ(preset(name).training.preset, name);
  }
  try {
    preset("quik");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "no preset \"quik\": there are quick, hybrid, enwik8");
  }
}

TEST(Config, RoundTrips) {
  const TemporaryDirectory dir;
  RunConfig config = preset("quick");
  config.training.split = {3, 2, 1};
  config.training.steps = 77;
  config.training.seed = 0xffff'ffff'ffff'fff0;
  config.training.learning_rate = 1.0 / 3;
  model::save_text(dir / "config.json", to_json(config));
  const RunConfig loaded = load_config(dir.path());
  EXPECT_EQ(to_json(loaded), to_json(config));
  EXPECT_EQ(loaded.training.seed, config.training.seed);
  EXPECT_EQ(loaded.training.learning_rate, 1.0 / 3);
  EXPECT_EQ(loaded.training.split, (Split{3, 2, 1}));
}

// Programs that take one path read it as a string.
TEST(Config, OnePathIsStoredAsAStringAndSeveralAsAList) {
  RunConfig config = preset("quick");
  const auto stored = [&] {
    return nlohmann::json::parse(to_json(config)).at("training").at("data");
  };
  for (const std::vector<std::string>& paths :
       {std::vector<std::string>{"/data/a, b"}, {"/data/a", "/data/b"}}) {
    config.training.data = paths;
    EXPECT_EQ(config_from_json(to_json(config)).training.data, paths);
    EXPECT_EQ(stored().is_string(), paths.size() == 1) << stored();
  }
  std::string text = to_json(config);
  text.replace(text.find("\"/data/b\""), 9, "[1]");
  try {
    config_from_json(text);
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("\"data\" must be a string or a list of strings"),
              std::string::npos)
        << error.what();
  }
}

// Programs of version 0.1 refuse options that they lack.
TEST(Config, RunsOnTheCpuAreStoredAsByVersion01) {
  const TemporaryDirectory dir;
  RunConfig config = preset("quick");
  for (const char* device : {"cpu", "cuda:1"}) {
    config.training.device = device;
    model::save_text(dir / "config.json", to_json(config));
    EXPECT_EQ(to_json(config).find("device") == std::string::npos, device == std::string("cpu"));
    EXPECT_EQ(load_config(dir.path()).training.device, device);
  }
}

TEST(Config, FieldsAndDocumentsAreStoredOnlyWhereTheyAreUsed) {
  RunConfig config = preset("quick");
  for (const char* name : {"\"field\"", "\"documents\""}) {
    EXPECT_EQ(to_json(config).find(name), std::string::npos);
  }
  config.training.field = "text";
  config.training.documents = true;
  const RunConfig loaded = config_from_json(to_json(config));
  EXPECT_EQ(loaded.training.field, "text");
  EXPECT_TRUE(loaded.training.documents);
  EXPECT_EQ(obstacles_to_resuming(preset("quick"), loaded), std::vector<std::string>{"documents"});
}

TEST(Devices, AreThereOrAreRefusedByName) {
  EXPECT_EQ(device_of("cpu"), torch::Device(torch::kCPU));
  const bool cuda = torch::cuda::is_available();
  EXPECT_EQ(device_of("auto"), torch::Device(cuda ? "cuda:0" : "cpu"));
  try {
    device_of("cuda:99");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("device must be one that is there: cpu"),
              std::string::npos);
    EXPECT_NE(std::string(error.what()).find("got \"cuda:99\""), std::string::npos);
  }
}

TEST(Config, ErrorsNameTheFileAndTheOption) {
  const TemporaryDirectory dir;
  const std::string good = to_json(preset("quick"));
  const auto load_with = [&](const std::string& from, const std::string& to) -> std::string {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    test::write_bytes(dir / "config.json", text);
    try {
      load_config(dir.path());
      return "no error";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  };
  EXPECT_NE(load_with("\"batch\": 8", "\"batch\": 0").find("batch must be 1 or more"),
            std::string::npos);
  EXPECT_NE(load_with("\"batch\"", "\"bacth\"").find("unknown option \"bacth\""),
            std::string::npos);
  EXPECT_NE(load_with("\"dim\": 128", "\"dim\": \"wide\"").find("\"dim\" must be an integer"),
            std::string::npos);
  EXPECT_NE(load_with("\"format\": 1", "\"format\": 9").find("format 9"), std::string::npos);
  const std::string deep = std::string(300'000, '[') + std::string(300'000, ']');
  EXPECT_NE(load_with("\"format\": 1", "\"format\": " + deep).find("levels or deeper"),
            std::string::npos);
  EXPECT_NE(load_with("{", "").find((dir / "config.json").string()), std::string::npos);
}

TEST(Config, ChecksNameTheOption) {
  const auto message = [](const std::function<void(RunConfig&)>& change) -> std::string {
    RunConfig config = preset("quick");
    change(config);
    try {
      check(config);
      return "no error";
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  };
  EXPECT_EQ(message([](RunConfig& c) { c.training.batch = 0; }), "batch must be 1 or more");
  EXPECT_EQ(message([](RunConfig& c) { c.training.beta2 = 1; }), "beta2 must be in [0, 1)");
  EXPECT_EQ(message([](RunConfig& c) { c.training.learning_rate = -1; }),
            "learning_rate must be a finite number, 0 or more");
  EXPECT_EQ(message([](RunConfig& c) { c.training.schedule = "step"; }),
            "schedule must be one of constant, linear, cosine, not \"step\"");
  EXPECT_EQ(message([](RunConfig& c) { c.training.rows_per_pass = -1; }),
            "rows_per_pass must be 0 or more");
  EXPECT_EQ(message([](RunConfig& c) { c.training.diagnostics_every = -1; }),
            "diagnostics_every must be 0 or more");
  EXPECT_EQ(message([](RunConfig& c) { c.training.gradient_compression = "fp8"; }),
            "gradient_compression must be one of none, bfloat16, not \"fp8\"");
  for (const char* name : {"gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1000", ""}) {
    EXPECT_EQ(message([&](RunConfig& c) { c.training.device = name; }),
              std::string("device must be cpu, cuda, cuda:N or auto, not \"") + name + "\"");
  }
  EXPECT_EQ(message([](RunConfig& c) { c.training.device = "cuda:3"; }), "no error");
  EXPECT_EQ(message([](RunConfig& c) { c.training.minutes.reset(); }),
            "how long to train: give steps, minutes or a plan");
  EXPECT_EQ(message([](RunConfig& c) { c.training.minutes = 1.0 / 0.0; }),
            "minutes must be a finite number, more than 0");
  EXPECT_EQ(message([](RunConfig& c) { c.training.batch = std::int64_t{1} << 60; }),
            "batch x accumulation x length must be below 2^63");
  EXPECT_NE(message([](RunConfig& c) { c.model.num_tokens = 255; }).find("256 or more"),
            std::string::npos);
}

TEST(Config, ResumingNeedsTheOptionsThatShapeTheRun) {
  RunConfig stored = preset("quick");
  stored.training.steps = 100;
  RunConfig requested = stored;
  EXPECT_TRUE(obstacles_to_resuming(stored, requested).empty());
  requested.training.checkpoint_every = 7;
  requested.training.threads = 9;
  requested.training.device = "cuda";
  requested.training.data = {"elsewhere"};
  requested.training.shard_optimizer = true;
  requested.training.checkpoint_blocks = true;
  EXPECT_TRUE(obstacles_to_resuming(stored, requested).empty());
  requested.training.steps = 200;
  requested.training.batch = 3;
  requested.training.gradient_compression = "bfloat16";
  requested.model.dim = 8;
  EXPECT_EQ(obstacles_to_resuming(stored, requested),
            (std::vector<std::string>{"dim", "steps", "batch", "gradient_compression"}));
  // Without a decay the steps made do not depend on those to come.
  stored = preset("enwik8");
  requested = stored;
  requested.training.steps = 200'000;
  EXPECT_TRUE(obstacles_to_resuming(stored, requested).empty());
}

TEST(Memory, RunsTogetherWhatFits) {
  RunConfig config = preset("enwik8");
  config.training.length = 256;
  const std::int64_t row = activation_bytes_per_row(config);
  EXPECT_EQ(choose_rows_per_pass(config, 16, 2 * 16 * row), 16);
  EXPECT_EQ(choose_rows_per_pass(config, 16, 2 * 16 * row - 2), 4);
  EXPECT_EQ(choose_rows_per_pass(config, 16, 0), 4);  // the system does not say
  EXPECT_EQ(choose_rows_per_pass(config, 3, 2 * 3 * row), 3);
  EXPECT_EQ(choose_rows_per_pass(config, 3, 0), 3);
  // Of six layers, one and what the others read.
  config.training.checkpoint_blocks = true;
  EXPECT_LT(activation_bytes_per_row(config), row / 3);
  EXPECT_GT(model::available_memory(), 0);
}

TEST(Memory, ReplicasAreThreadsThatShareTheRowsEvenly) {
  RunConfig config = preset("quick");
  config.training.length = 256;
  const auto replicas = [&](std::int64_t threads, std::int64_t rows) {
    config.training.threads = threads;
    return choose_replicas(config, rows);
  };
  EXPECT_EQ(replicas(1, 8), 1);
  EXPECT_EQ(replicas(2, 8), 2);
  EXPECT_EQ(replicas(8, 8), 8);
  EXPECT_EQ(replicas(3, 8), 1);
  EXPECT_EQ(replicas(16, 8), 1);
  // Gradients larger than what the rows keep.
  config.training.length = 32;
  EXPECT_EQ(replicas(2, 8), 2);
  EXPECT_EQ(replicas(8, 8), 1);
  config.training.checkpoint_blocks = true;
  EXPECT_EQ(replicas(2, 8), 1);
}

TEST(Memory, AdvisesWhereAPassIsLikelyNotToFit) {
  RunConfig config = preset("enwik8");
  config.training.length = 65'536;
  config.training.rows_per_pass = 2;
  const std::int64_t likely = activation_bytes_per_row(config);  // of two rows, half the estimate
  EXPECT_FALSE(memory_advice(config, likely));
  EXPECT_FALSE(memory_advice(config, 0));
  const std::string estimate = "A pass of 2 x 65536 bytes takes by estimate " +
                               std::to_string(likely / 1'000'000'000) + " GB, 8 GB are free: ";
  EXPECT_EQ(memory_advice(config, 8'000'000'000),
            estimate + "a smaller rows_per_pass or checkpoint_blocks needs less");
  config.training.rows_per_pass = 1;
  config.training.checkpoint_blocks = true;
  EXPECT_NE(memory_advice(config, 100)->find("0 GB are free: a smaller length needs less"),
            std::string::npos);
}

TEST(DefaultThreads, OfASlurmTaskAreItsOwn) {
  const int all = std::min(model::usable_cpus(), torch::get_num_threads());
  EXPECT_EQ(default_threads(), all);
  EXPECT_EQ(default_threads(10'000), 1);
  const std::pair<const char*, std::string> variables[] = {
      {"SLURM_PROCID", "0"},
      {"SLURM_STEP_NUM_TASKS", "10000"},
      {"SLURM_STEP_NODELIST", "localhost"},
      {"SLURM_JOB_ID", "1"},
      {"SLURM_CPUS_PER_TASK", std::to_string(all)}};
  for (const auto& [name, value] : variables) ::setenv(name, value.c_str(), 1);
  EXPECT_EQ(default_threads(10'000), all);
  ::setenv("SLURM_CPUS_PER_TASK", "1", 1);
  EXPECT_EQ(default_threads(), 1);
  for (const auto& [name, value] : variables) ::unsetenv(name);
}

}  // namespace
}  // namespace gateloop::training
