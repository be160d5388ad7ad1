// Every number of the presets, in one place.
#include <algorithm>
#include <stdexcept>

#include "gateloop/launch.h"
#include "gateloop/training.h"
#include "model/machine.h"

namespace gateloop::training {
namespace {

/// 2 cores, 5 minutes, 1.45 M parameters: GateLoop behind a simple gate loop. The runs that chose
/// it are in docs/presets.md.
RunConfig quick() {
  RunConfig config;
  nn::TransformerOptions& model = config.model;
  model.dim = 128;
  model.depth = 5;
  model.simple_gate_loop = model::SimpleGateLoopSpec{};
  model.gate = nn::Gate::kSigmoid;
  model.normalize_input = model::NormalizeInput::kMean;
  model.transition_bias = {-1.0, 5.0};

  TrainingOptions& training = config.training;
  training.minutes = 5;
  training.batch = 8;
  training.accumulation = 1;
  training.length = 256;
  training.optimizer = "adamw";
  training.learning_rate = 5e-3;
  training.beta2 = 0.98;
  training.weight_decay = 0.2;
  training.clip = 1.0;
  training.schedule = "linear";
  training.warmup_steps = 100;
  training.dtype = fastest_dtype();
  training.validate_every = 500;
  training.validation_windows = 64;
  training.sample_every = 0;
  training.checkpoint_every = 1000;
  return config;
}

/// quick with local attention instead of GateLoop in the last layer; as many parameters.
RunConfig hybrid() {
  RunConfig config = quick();
  nn::TransformerOptions& model = config.model;
  model.layer_pattern = "gate_loop*4,attention";
  model.heads = 4;
  model.dim_head = 32;
  model.window = 64;
  model.rotary_emb = true;
  return config;
}

/// The reference's train.py, number for number. It takes one validation batch of 4 sequences where
/// we take the same 64 windows every time; that changes no update.
RunConfig enwik8() {
  RunConfig config;
  nn::TransformerOptions& model = config.model;
  model.dim = 512;
  model.depth = 6;
  model.gate_loop_heads = 512;
  model.post_ln_norm = true;

  TrainingOptions& training = config.training;
  training.steps = 100'000;
  training.batch = 4;
  training.accumulation = 4;
  training.length = 256;
  training.optimizer = "adam";
  training.learning_rate = 1e-4;
  training.beta1 = 0.9;
  training.beta2 = 0.99;
  training.epsilon = 1e-8;
  training.clip = 0.5;
  training.schedule = "constant";
  training.dtype = "float32";
  training.validate_every = 100;
  training.sample_every = 500;
  training.sample_prime = 128;
  training.sample_length = 512;
  training.checkpoint_every = 500;
  return config;
}

struct NamedPreset {
  const char* name;
  RunConfig (*make)();
};
constexpr NamedPreset kPresets[] = {{"quick", quick}, {"hybrid", hybrid}, {"enwik8", enwik8}};

}  // namespace

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const NamedPreset& preset : kPresets) names.emplace_back(preset.name);
  return names;
}

RunConfig preset(std::string_view name) {
  std::string known;
  for (const NamedPreset& preset : kPresets) {
    if (name == preset.name) {
      RunConfig config = preset.make();
      config.training.preset = name;
      return config;
    }
    known += (known.empty() ? "" : ", ") + std::string(preset.name);
  }
  throw std::invalid_argument("no preset \"" + std::string(name) + "\": there are " + known);
}

std::string fastest_dtype() {
  // Every processor with bfloat16 tiles (AMX) has the AVX-512 instructions too. Without either,
  // oneDNN converts to float32 and back: slower than float32 itself.
  return __builtin_cpu_supports("avx512bf16") ? "bfloat16" : "float32";
}

namespace {

/// Of each process, as the launcher says; 0 where it does not.
int given_cpus() {
  try {
    return distributed::launch_from_environment().cpus;
  } catch (const std::invalid_argument&) {  // Communicator::join is not reached with such variables
    return 0;
  }
}

}  // namespace

int default_threads(int processes) {
  const int usable = model::usable_cpus();
  const int given = given_cpus();
  // srun may have bound each process to processors of its own, which are then not to be shared.
  const int own = given > 0 ? std::min(given, usable) : std::max(1, usable / processes);
  return std::min(torch::get_num_threads(), own);
}

}  // namespace gateloop::training
