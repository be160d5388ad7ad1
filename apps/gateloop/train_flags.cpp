#include "train_flags.h"

#include <CLI/CLI.hpp>
#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <utility>

#include "commands.h"
#include "process_flags.h"

namespace gateloop::app {

using training::RunConfig;
using training::TrainingOptions;

namespace {

std::string text_of(bool value) { return value ? "on" : "off"; }
std::string text_of(const std::string& value) { return value.empty() ? "unset" : value; }
template <typename Enum>
requires std::is_enum_v<Enum> std::string text_of(Enum value) {
  return std::string(model::name_of(value));
}
template <typename Number>
requires std::is_arithmetic_v<Number> std::string text_of(Number value) {
  std::ostringstream out;
  out << value;
  return out.str();
}
std::string text_of(const std::pair<double, double>& value) {
  return text_of(value.first) + "," + text_of(value.second);
}
template <typename T>
std::string text_of(const std::optional<T>& value) {
  return value ? text_of(*value) : "unset";
}

/// "[256]", or where the presets differ "[quick 256, enwik8 512]".
template <typename Field>
std::string defaults(Field field) {
  std::string text;
  std::string first;
  bool equal = true;
  for (const std::string& name : training::preset_names()) {
    RunConfig config = training::preset(name);
    const std::string value = text_of(field(config));
    if (text.empty()) first = value;
    equal = equal && value == first;
    text.append(text.empty() ? "" : ", ").append(name).append(" ").append(value);
  }
  return " [" + (equal ? first : text) + "]";
}

/// Restricts the option to the names of an enumeration's values.
template <typename Enum>
CLI::Option* by_name(CLI::Option* option, Enum any) {
  std::string names;
  for (const auto& [name, value] : model::names_of(any))
    names.append(names.empty() ? "" : "|").append(name);
  const auto to_number = [any, names](std::string& given) -> std::string {
    for (const auto& [name, value] : model::names_of(any)) {
      if (given != name) continue;
      given = std::to_string(static_cast<int>(value));
      return {};
    }
    return "must be one of " + names + ", got " + given;
  };
  return option->transform(CLI::Validator(to_number, names))->type_name(names);
}

template <typename T>
struct ValueOf {
  using type = T;
};
template <typename T>
struct ValueOf<std::optional<T>> {
  using type = T;
};

}  // namespace

class Overrides {
 public:
  explicit Overrides(CLI::App& command) : command_(command) {}

  void group(const char* name) { group_ = name; }
  CLI::App& command() const { return command_; }

  /// `field` gives the field of a RunConfig that --NAME sets.
  template <typename Field>
  CLI::Option* add(const std::string& name, Field field, const std::string& help) {
    using Stored = std::remove_reference_t<decltype(field(std::declval<RunConfig&>()))>;
    using Value = typename ValueOf<Stored>::type;
    const auto value = std::make_shared<Value>();
    CLI::Option* option = nullptr;
    if constexpr (std::is_same_v<Value, bool>) {
      option = command_.add_flag("--" + name + ",!--no-" + name, *value, help + defaults(field));
    } else if constexpr (std::is_same_v<Value, model::NormalizeInput>) {
      const std::string flag = "--" + name + "{mean},--no-" + name + "{none}";
      option = by_name(command_.add_flag(flag, *value, help + defaults(field)), Value());
    } else if constexpr (std::is_enum_v<Value>) {
      option = by_name(command_.add_option("--" + name, *value, help + defaults(field)), Value());
    } else {
      option = command_.add_option("--" + name, *value, help + defaults(field));
    }
    option->group(group_);
    setters_.push_back([option, value, field](RunConfig& config) {
      if (option->count() > 0) field(config) = *value;
    });
    return option;
  }

  void apply(RunConfig& config) const {
    for (const auto& set : setters_) set(config);
  }

 private:
  CLI::App& command_;
  std::string group_;
  std::vector<std::function<void(RunConfig&)>> setters_;
};

namespace {

#define TRAINING_FIELD(name) ([](RunConfig & config) -> auto& { return config.training.name; })
#define MODEL_FIELD(name) ([](RunConfig & config) -> auto& { return config.model.name; })

void add_training_flags(Overrides& flags) {
  flags.group("One step");
  flags.add("batch", TRAINING_FIELD(batch), "Sequences per micro-batch");
  flags.add("accumulation", TRAINING_FIELD(accumulation), "Micro-batches per step");
  flags.add("length", TRAINING_FIELD(length), "Bytes per sequence");
  flags.add("rows-per-pass", TRAINING_FIELD(rows_per_pass),
            "Sequences whose activations are kept at the same time; 0: all of a step's if the "
            "memory allows, else one micro-batch");
  flags.add("checkpoint-blocks", TRAINING_FIELD(checkpoint_blocks),
            "Keep of each layer only what it reads and run it again in the backward pass: long "
            "sequences in less memory");
  flags.add("fixed-transitions", TRAINING_FIELD(fixed_transitions),
            "GateLoop's transitions are learned and do not depend on the text");
  flags
      .add("dtype", TRAINING_FIELD(dtype),
           "float32, or bfloat16: matrix products and activations in bfloat16, weights in "
           "float32")
      ->type_name("float32|bfloat16");
  flags
      .add("device", TRAINING_FIELD(device),
           "cpu, cuda, cuda:N, or auto: CUDA where libtorch finds some, else the CPU")
      ->type_name("DEVICE");
  flags.add(
      "threads", TRAINING_FIELD(threads),
      "Threads; 0: one for each core that this process may use, or OMP_NUM_THREADS if that is "
      "less: torchrun sets it to 1. Fastest where they share the sequences of a pass evenly. The "
      "same seed gives the same losses with the same number");

  flags.group("Optimiser");
  flags.add("optimizer", TRAINING_FIELD(optimizer), "adam, or adamw: with decoupled decay")
      ->type_name("adam|adamw");
  flags.add("learning-rate", TRAINING_FIELD(learning_rate), "Peak learning rate");
  flags.add("schedule", TRAINING_FIELD(schedule), "After the warm-up: constant, or to zero")
      ->type_name("constant|linear|cosine");
  flags.add("warmup-steps", TRAINING_FIELD(warmup_steps), "Steps of linear warm-up");
  flags.add("beta1", TRAINING_FIELD(beta1), "Decay of the first moment");
  flags.add("beta2", TRAINING_FIELD(beta2), "Decay of the second moment");
  flags.add("epsilon", TRAINING_FIELD(epsilon), "Added to the root of the second moment");
  flags.add("weight-decay", TRAINING_FIELD(weight_decay), "Weight decay, of matrices only");
  flags.add("clip", TRAINING_FIELD(clip), "Largest gradient norm; 0: no limit");

  flags.group("Validation, samples, checkpoints, diagnostics");
  flags.add("validate-every", TRAINING_FIELD(validate_every), "Steps; 0: only at the end");
  flags.add("validation-windows", TRAINING_FIELD(validation_windows),
            "Sequences per validation, evenly spaced and always the same");
  flags.add("final-windows", TRAINING_FIELD(final_windows),
            "Sequences of the last validation; the whole part where it holds no more");
  flags.add("sample-every", TRAINING_FIELD(sample_every), "Steps; 0: only at the end");
  flags.add("sample-prime", TRAINING_FIELD(sample_prime), "Bytes of text a sample continues");
  flags.add("sample-length", TRAINING_FIELD(sample_length), "Bytes to draw; 0: no samples");
  flags.add("checkpoint-every", TRAINING_FIELD(checkpoint_every),
            "Steps; 0: only at the end and when stopped");
  flags.add("diagnostics-every", TRAINING_FIELD(diagnostics_every),
            "Steps; what each layer does and how it learns, in metrics.jsonl; 0: never");
}

void add_process_flags(Overrides& flags) {
  flags
      .add("gradient-compression", TRAINING_FIELD(gradient_compression),
           "bfloat16: gradients travel between processes at half the bytes")
      ->type_name("none|bfloat16");
  flags.add("shard-optimizer", TRAINING_FIELD(shard_optimizer),
            "Each process keeps a part of the optimiser's state (ZeRO, stage 1)");
}

void add_model_flags(TrainFlags& given) {
  Overrides& flags = *given.overrides;
  flags.group("Model");
  flags.add("dim", MODEL_FIELD(dim), "Width of the residual stream");
  flags.add("depth", MODEL_FIELD(depth), "Layers");
  flags.add("ff-mult", MODEL_FIELD(ff_mult), "Hidden width of the feed-forward, in dim");
  flags.add("post-ln-norm", MODEL_FIELD(post_ln_norm), "Norm after the residual sum, not before");
  given.mixer_given = flags.add("use-gate-looped-attn", MODEL_FIELD(use_gate_looped_attn),
                                "GateLoop layers; --no-use-gate-looped-attn: full attention");

  given.layers_given =
      flags
          .add("layers", MODEL_FIELD(layer_pattern),
               "Mixers of the layers, a pattern of gate_loop, attention and none that is repeated "
               "to "
               "the depth: gate_loop*2,attention; unset: as --use-gate-looped-attn says")
          ->type_name("PATTERN");
  flags.add("tie-embeddings", MODEL_FIELD(tie_embeddings), "The logits' matrix is the embedding");
  flags.command()
      .add_option("--simple-gate-loop", given.simple_gate_loop,
                  "A simple gate loop with a residual in front of every layer's mixer" +
                      defaults([](const RunConfig& config) {
                        return std::string(config.model.simple_gate_loop ? "every" : "none");
                      }))
      ->check(CLI::IsMember({"every", "none"}))
      ->type_name("every|none")
      ->group("Model");

  flags.group("Model: GateLoop layers");
  given.gate_given = flags.add("gate", MODEL_FIELD(gate),
                               "polar: complex, as in the reference; magnitude_phase: complex, as "
                               "in the paper; sigmoid: real, faster");
  given.normalize_input_given = flags.add("normalize-input", MODEL_FIELD(normalize_input),
                                          "Scale the input by 1 - |a|; =variance: √(1 - |a|²)");
  given.transition_bias_given =
      flags
          .add("transition-bias", MODEL_FIELD(transition_bias),
               "Initial bias of |a| before its σ, spread over LOW..HIGH (not the polar gate)")
          ->delimiter(',')
          ->type_name("LOW,HIGH");
  flags
      .add("phase-bias", MODEL_FIELD(phase_bias),
           "Initial phases in radians, spread over LOW..HIGH (magnitude_phase gate)")
      ->delimiter(',')
      ->type_name("LOW,HIGH");
  flags.add("per-key-transitions", MODEL_FIELD(per_key_transitions),
            "A transition for every key channel instead of one for every head");
  flags.add("gate-loop-dim-key", MODEL_FIELD(gate_loop_dim_key),
            "Width of all heads' keys; unset: inner width");
  flags.add("feature-map", MODEL_FIELD(feature_map),
            "taylor: products of queries and keys as 1 + s + s²/2");
  flags.add("dim-gate-looped-attn", MODEL_FIELD(dim_gate_looped_attn), "Inner width; unset: dim");
  flags.add("joint-kv", MODEL_FIELD(joint_kv),
            "One projection to the recurrence's input instead of one to k and one to v");
  flags.add("gate-loop-heads", MODEL_FIELD(gate_loop_heads), "Heads; unset: one per channel");
  flags.add("attn-add-swish-gating", MODEL_FIELD(attn_add_swish_gating), "Gate the output");
  flags.add("sub-ln", MODEL_FIELD(sub_ln), "Norm inside the layer");
  flags.add("frac-gradient-state-transition", MODEL_FIELD(frac_gradient_state_transition),
            "Share of the gradient that the transition gets");
  flags.add("checkpoint-gate-looped-attn", MODEL_FIELD(checkpoint_gate_looped_attn),
            "Recompute states where heads are wider than one channel");
  flags.add("ablate-complex", MODEL_FIELD(ablate_complex), "Real part of the transition only");
  flags.add("ablate-state-transition", MODEL_FIELD(ablate_state_transition), "Transition 1");

  flags.group("Model: attention layers");
  flags.add("heads", MODEL_FIELD(heads), "Heads");
  flags.add("dim-head", MODEL_FIELD(dim_head), "Width of a head");
  flags.add("window", MODEL_FIELD(window),
            "Steps that a step attends to, itself included; unset: all");
  flags.add("rotary-emb", MODEL_FIELD(rotary_emb), "Rotary position embedding");
  flags.add("data-dependent-rel-pos", MODEL_FIELD(data_dependent_rel_pos),
            "Positions from the data, as GateLoop's transitions");
  flags.add("attn-softmax-normalize", MODEL_FIELD(attn_softmax_normalize),
            "Softmax; unset: unless data-dependent-rel-pos");
}

#undef TRAINING_FIELD
#undef MODEL_FIELD

}  // namespace

void add_train_flags(CLI::App& command, TrainFlags& flags) {
  std::string names;
  for (const std::string& name : training::preset_names()) {
    names += (names.empty() ? "" : "|") + name;
  }
  flags.preset_given =
      command
          .add_option("--preset", flags.preset,
                      "quick: a small model, minutes on two cores; hybrid: the same with local "
                      "attention in its last layer; enwik8: the reference's experiment, days on a "
                      "CPU [quick]")
          ->check(CLI::IsMember(training::preset_names()))
          ->type_name(names);
  add_data_flags(command, flags.corpus,
                 "Any file or folder [data/enwik8, else data/wiki_sample: `make corpus`]");
  add_split_flag(command, flags.corpus);
  command.add_option("--out", flags.out, "Directory of the run [runs/PRESET]")->type_name("DIR");
  flags.steps_given =
      command
          .add_option("--steps", flags.steps,
                      "Length of the run" + defaults([](RunConfig & config) -> auto& {
                        return config.training.steps;
                      }))
          ->check(CLI::PositiveNumber)
          ->type_name("N");
  flags.minutes_given =
      command
          .add_option(
              "--minutes", flags.minutes,
              "Length of the run, validation and saving included: the steps are timed, and "
              "their number is corrected on the way" +
                  defaults([](RunConfig & config) -> auto& { return config.training.minutes; }))
          ->check(CLI::PositiveNumber)
          ->excludes(flags.steps_given)
          ->type_name("M");
  command
      .add_option("--plan", flags.plan,
                  "Length of the run, and its decay, as in an earlier run of --minutes")
      ->check(CLI::ExistingDirectory)
      ->excludes(flags.steps_given)
      ->excludes(flags.minutes_given)
      ->type_name("DIR");
  flags.seed_given = command.add_option("--seed", flags.seed, "Of weights and batches [0]");
  auto* resume = command.add_flag("--resume", flags.resume,
                                  "Go on with the run in --out, with its own options");
  command
      .add_flag("--overwrite", flags.overwrite, "Remove the run that --out holds, and start anew")
      ->excludes(resume);
  command
      .add_option("--backend", flags.backend, "auto: nccl between CUDA devices, else gloo [auto]")
      ->check(CLI::IsMember({"auto", "gloo", "nccl"}))
      ->type_name("auto|gloo|nccl")
      ->group(kProcesses);
  add_timeout_flag(command, flags.timeout, "process 0 takes to validate, sample and save");
  flags.overrides = std::make_shared<Overrides>(command);
  flags.overrides->group(kProcesses);
  add_process_flags(*flags.overrides);
  add_training_flags(*flags.overrides);
  add_model_flags(flags);
}

void apply_overrides(const TrainFlags& flags, RunConfig& config) { flags.overrides->apply(config); }

RunConfig configure(const TrainFlags& flags) {
  RunConfig config =
      flags.resume ? training::load_config(flags.dir()) : training::preset(flags.preset);
  TrainingOptions& options = config.training;
  if (flags.preset_given->count() > 0) options.preset = flags.preset;
  if (flags.seed_given->count() > 0) options.seed = flags.seed;
  if (flags.steps_given->count() > 0) {
    options.steps = flags.steps;
    if (!flags.resume) options.minutes.reset();
  }
  if (flags.minutes_given->count() > 0) {
    options.minutes = flags.minutes;
    if (!flags.resume) options.steps.reset();
  }
  if (!flags.plan.empty()) {
    options.plan = training::load_config(flags.plan).training.plan;
    if (options.plan.empty()) {
      throw UsageError("--plan " + flags.plan +
                       ": its length was not planned by --minutes: give --steps");
    }
    options.steps.reset();
    options.minutes.reset();
  }
  if (const auto parts = flags.corpus.parts()) options.split = parts;
  if (!flags.corpus.field.empty()) options.field = flags.corpus.field;
  if (flags.corpus.documents) options.documents = true;
  apply_overrides(flags, config);
  if (!flags.simple_gate_loop.empty()) {
    config.model.simple_gate_loop.reset();
    if (flags.simple_gate_loop == "every") config.model.simple_gate_loop.emplace();
  }
  // `--gate polar` alone shall be enough: what a preset adds for the sigmoid gate goes with it.
  if (flags.gate_given->count() > 0 && !flags.resume && config.model.gate == nn::Gate::kPolar) {
    if (flags.normalize_input_given->count() == 0) {
      config.model.normalize_input = model::NormalizeInput::kNone;
    }
    if (flags.transition_bias_given->count() == 0) config.model.transition_bias.reset();
  }
  // Each given alone, the newer way to choose mixers and the older replace one another.
  if (flags.layers_given->count() > 0) config.model.layers.clear();
  if (flags.mixer_given->count() > 0 && flags.layers_given->count() == 0) {
    config.model.layer_pattern.clear();
    config.model.layers.clear();
  }
  training::check(config);
  return config;
}

}  // namespace gateloop::app
