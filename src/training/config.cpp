#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "gateloop/checkpoint.h"
#include "gateloop/training.h"
#include "model/config_file.h"
#include "model/parse_json.h"
#include "training/device.h"
#include "training/files.h"
#include "training/plan.h"

// Where the fields' codec looks for them: beside the type.
namespace gateloop::corpus {

using model::json_fields::json;

json encode(const Split& split) { return json::array({split.train, split.valid, split.test}); }
void decode(const std::string& name, const json& value, Split& split) {
  if (!value.is_array() || value.size() != 3 ||
      !std::all_of(value.begin(), value.end(),
                   [](const json& part) { return part.is_number_integer(); })) {
    model::json_fields::wrong_type(name, "three integers [train, valid, test]", value);
  }
  split = {value[0].get<std::int64_t>(), value[1].get<std::int64_t>(),
           value[2].get<std::int64_t>()};
}

}  // namespace gateloop::corpus

namespace gateloop::training {

using model::json_fields::json;
using model::json_fields::kConfigFormat;

json encode(const std::vector<PlannedLength>& plan) {
  json list = json::array();
  for (const PlannedLength& planned : plan) list.push_back({planned.step, planned.steps});
  return list;
}
void decode(const std::string& name, const json& value, std::vector<PlannedLength>& plan) {
  const char* expected = "a list of pairs [step, steps], step rising and 0 <= step <= steps";
  if (!value.is_array()) model::json_fields::wrong_type(name, expected, value);
  plan.clear();
  for (const json& pair : value) {
    const bool numbers = pair.is_array() && pair.size() == 2 && pair[0].is_number_integer() &&
                         pair[1].is_number_integer();
    const PlannedLength planned =
        numbers ? PlannedLength{pair[0].get<std::int64_t>(), pair[1].get<std::int64_t>()}
                : PlannedLength{.step = -1};
    const std::int64_t least = plan.empty() ? 0 : plan.back().step + 1;
    if (planned.step < least || planned.steps < planned.step) {
      model::json_fields::wrong_type(name, expected, value);
    }
    plan.push_back(planned);
  }
}

std::string plan_to_json(const std::vector<PlannedLength>& plan) { return encode(plan).dump(); }

std::vector<PlannedLength> plan_from_json(const std::string& text) {
  std::vector<PlannedLength> plan;
  decode("plan", model::parse_json<json>(text), plan);
  return plan;
}

/// Every field of TrainingOptions, once; found by argument-dependent lookup.
GATELOOP_JSON_FIELDS(TrainingOptions, preset, data, field, documents, split, fingerprint, steps,
                     minutes, plan, batch, accumulation, length, rows_per_pass, checkpoint_blocks,
                     fixed_transitions, optimizer, learning_rate, beta1, beta2, epsilon,
                     weight_decay, clip, schedule, warmup_steps, dtype, seed, threads, device,
                     gradient_compression, shard_optimizer, validate_every, validation_windows,
                     final_windows, sample_every, sample_prime, sample_length, checkpoint_every,
                     diagnostics_every)

namespace {

constexpr const char* kCpu = "cpu";

json model_json(const nn::TransformerOptions& options) {
  return json::parse(model::to_json(options));
}

bool may_change(const std::string& name, const TrainingOptions& stored) {
  // The corpus is compared by its fingerprint, not by where it lies.
  for (const char* free : {"data", "field", "fingerprint", "threads", "device", "sample_every",
                           "shard_optimizer", "sample_prime", "sample_length", "checkpoint_every",
                           "checkpoint_blocks", "diagnostics_every"}) {
    if (name == free) return true;
  }
  return name == "steps" && stored.schedule == "constant";
}

[[noreturn]] void invalid(const std::string& name, const std::string& expected) {
  throw std::invalid_argument(name + " must be " + expected);
}

void check_one_of(const std::string& name, const std::string& value,
                  std::initializer_list<const char*> allowed) {
  std::string list;
  for (const char* choice : allowed) {
    if (value == choice) return;
    list += (list.empty() ? "" : ", ") + std::string(choice);
  }
  invalid(name, "one of " + list + ", not \"" + value + "\"");
}

}  // namespace

void check(const RunConfig& config) {
  const TrainingOptions& training = config.training;
  const auto at_least = [](const char* name, std::int64_t value, std::int64_t least) {
    if (value < least) invalid(name, std::to_string(least) + " or more");
  };
  at_least("batch", training.batch, 1);
  at_least("accumulation", training.accumulation, 1);
  at_least("length", training.length, 1);
  at_least("rows_per_pass", training.rows_per_pass, 0);
  at_least("warmup_steps", training.warmup_steps, 0);
  at_least("threads", training.threads, 0);
  if (training.threads > 4096) invalid("threads", "4096 or less");
  at_least("validate_every", training.validate_every, 0);
  at_least("validation_windows", training.validation_windows, 1);
  at_least("final_windows", training.final_windows, 1);
  at_least("sample_every", training.sample_every, 0);
  at_least("checkpoint_every", training.checkpoint_every, 0);
  at_least("diagnostics_every", training.diagnostics_every, 0);
  std::int64_t rows = 0;
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(training.batch, training.accumulation, &rows) ||
      __builtin_mul_overflow(rows, training.length, &bytes)) {
    invalid("batch x accumulation x length", "below 2^63");
  }
  if (training.steps) at_least("steps", *training.steps, 1);
  if (training.minutes && !(*training.minutes > 0 && std::isfinite(*training.minutes))) {
    invalid("minutes", "a finite number, more than 0");
  }
  if (!training.steps && !training.minutes && training.plan.empty()) {
    throw std::invalid_argument("how long to train: give steps, minutes or a plan");
  }
  const auto in_unit_interval = [](const char* name, double value) {
    if (!(value >= 0 && value < 1)) invalid(name, "in [0, 1)");
  };
  in_unit_interval("beta1", training.beta1);
  in_unit_interval("beta2", training.beta2);
  const auto not_negative = [](const char* name, double value) {
    if (!(value >= 0) || std::isinf(value)) invalid(name, "a finite number, 0 or more");
  };
  not_negative("learning_rate", training.learning_rate);
  not_negative("epsilon", training.epsilon);
  not_negative("weight_decay", training.weight_decay);
  not_negative("clip", training.clip);
  check_one_of("optimizer", training.optimizer, {"adam", "adamw"});
  check_one_of("schedule", training.schedule, {"constant", "linear", "cosine"});
  if (!is_device_name(training.device))
    invalid("device", "cpu, cuda, cuda:N or auto, not \"" + training.device + "\"");
  check_one_of("dtype", training.dtype, {"float32", "bfloat16"});
  check_one_of("gradient_compression", training.gradient_compression, {"none", "bfloat16"});
  model::resolve(config.model);  // throws for options that do not fit
  if (config.model.num_tokens < 256) {
    invalid("num_tokens", "256 or more: the corpus is read as bytes");
  }
}

std::string to_json(const RunConfig& config) {
  json object = json::object();
  object["format"] = kConfigFormat;
  object["model"] = model_json(config.model);
  object["training"] = model::json_fields::encode_fields(config.training);
  // Earlier programs take an option that they lack for an error.
  json& training = object["training"];
  if (config.training.device == kCpu) training.erase("device");
  if (config.training.field.empty()) training.erase("field");
  if (!config.training.documents) training.erase("documents");
  if (config.training.plan.empty()) training.erase("plan");
  if (config.training.gradient_compression == "none") training.erase("gradient_compression");
  if (!config.training.checkpoint_blocks) training.erase("checkpoint_blocks");
  if (!config.training.fixed_transitions) training.erase("fixed_transitions");
  if (!config.training.shard_optimizer) training.erase("shard_optimizer");
  if (config.training.diagnostics_every == 0) training.erase("diagnostics_every");
  if (!config.id.empty()) object["id"] = config.id;
  for (const std::string& text : config.provenance) {
    object["provenance"].push_back(json::parse(text));
  }
  return object.dump(2) + "\n";
}

namespace {

RunConfig decode(const json& object) {
  RunConfig config;
  config.model = model::options_from_json(object.at("model").dump());
  config.training.device = kCpu;  // where none is said
  model::json_fields::decode_fields(object.at("training"), config.training);
  config.id = model::id_of(object);
  config.provenance = model::provenance_of(object);
  check(config);
  return config;
}

}  // namespace

RunConfig config_from_json(const std::string& text) {
  return decode(model::parse_json<json>(text));
}

RunConfig load_config(const std::filesystem::path& dir) {
  const json object = model::read_config(dir, {"model", "training"});
  try {
    return decode(object);
  } catch (const std::exception& error) {
    model::fail_config(dir, error.what());
  }
}

bool holds_run(const std::filesystem::path& dir) {
  return std::any_of(std::begin(kRunFiles), std::end(kRunFiles),
                     [&](const char* file) { return std::filesystem::exists(dir / file); });
}

std::vector<std::string> obstacles_to_resuming(const RunConfig& stored,
                                               const RunConfig& requested) {
  std::vector<std::string> names;
  const json stored_model = model_json(stored.model);
  const json requested_model = model_json(requested.model);
  // What is left out is at its default.
  std::set<std::string> model_names;
  for (const json& options : {stored_model, requested_model}) {
    for (const auto& [name, value] : options.items()) model_names.insert(name);
  }
  for (const std::string& name : model_names) {
    if (stored_model.value(name, json()) != requested_model.value(name, json()))
      names.push_back(name);
  }
  const json stored_training = model::json_fields::encode_fields(stored.training);
  const json requested_training = model::json_fields::encode_fields(requested.training);
  for (const auto& [name, value] : requested_training.items()) {
    if (stored_training[name] != value && !may_change(name, stored.training)) names.push_back(name);
  }
  return names;
}

}  // namespace gateloop::training
