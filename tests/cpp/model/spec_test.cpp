// What options and JSON say, as the description of a model.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "gateloop/model.h"

namespace gateloop::model {
namespace {

ModelOptions small(std::int64_t depth = 5) {
  ModelOptions options;
  options.dim = 8;
  options.depth = depth;
  options.heads = 2;
  options.dim_head = 4;
  return options;
}

std::string mixers(const ModelSpec& spec) {
  std::string names;
  for (const LayerSpec& layer : spec.layers)
    names.append(names.empty() ? "" : " ").append(mixer_name(layer.mixer));
  return names;
}

template <typename Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

void expect_refused(const std::string& json, const std::string& part) {
  const std::string message = message_of([&] { resolve(options_from_json(json)); });
  EXPECT_NE(message.find(part), std::string::npos) << json << " gave: " << message;
}

TEST(Spec, FlagsGiveEveryLayerOneMixer) {
  ModelOptions options = small(2);
  EXPECT_EQ(mixers(resolve(options)), "gate_loop gate_loop");
  options.use_gate_looped_attn = false;
  options.data_dependent_rel_pos = true;
  const ModelSpec spec = resolve(options);
  EXPECT_EQ(mixers(spec), "attention attention");
  EXPECT_FALSE(std::get<AttentionSpec>(spec.layers[0].mixer).softmax_normalize);
}

TEST(Spec, PatternsRepeatToTheDepth) {
  ModelOptions options = small();
  options.layer_pattern = "gate_loop*2,attention";
  EXPECT_EQ(mixers(resolve(options)), "gate_loop gate_loop attention gate_loop gate_loop");
  options.layer_pattern = "none";
  EXPECT_EQ(mixers(resolve(options)), "none none none none none");
}

TEST(Spec, PatternsThatAreNoneAreRefusedByName) {
  ModelOptions options = small();
  for (const std::string pattern :
       {"gateloop", "gate_loop*", "gate_loop*0", "gate_loop*-1", "gate_loop*2x", "gate_loop,,none",
        "gate_loop*6", "gate_loop*99999999999999999999"}) {
    options.layer_pattern = pattern;
    const std::string message = message_of([&] { resolve(options); });
    EXPECT_NE(message.find("Transformer: layers must be a pattern"), std::string::npos) << pattern;
    EXPECT_NE(message.find(pattern), std::string::npos) << message;
  }
}

TEST(Spec, ListsOverrideTheOptions) {
  const ModelOptions options = options_from_json(R"({
      "dim": 8, "depth": 4, "heads": 2, "dim_head": 4, "ff_mult": 2,
      "layers": ["gate_loop", {"mixer": "attention", "window": 16, "heads": 1, "ff_mult": 3,
                               "simple_gate_loop": {"post_ln": true}}]})");
  const ModelSpec spec = resolve(options);
  EXPECT_EQ(mixers(spec), "gate_loop attention gate_loop attention");
  const LayerSpec& last = spec.layers.back();
  const auto& attention = std::get<AttentionSpec>(last.mixer);
  EXPECT_EQ(attention.window, 16);
  EXPECT_EQ(attention.heads, 1);
  EXPECT_EQ(attention.dim_head, 4);
  EXPECT_EQ(last.ff_mult, 3);
  ASSERT_TRUE(last.simple_gate_loop.has_value());
  EXPECT_TRUE(last.simple_gate_loop->prenorm);
  EXPECT_TRUE(last.simple_gate_loop->post_ln);
  EXPECT_EQ(spec.layers[0].ff_mult, 2);
}

TEST(Spec, JsonRoundTrips) {
  ModelOptions options = small();
  const auto expect_kept = [&] {
    const ModelOptions read = options_from_json(to_json(options));
    EXPECT_EQ(to_json(read), to_json(options));
    EXPECT_EQ(resolve(read), resolve(options));
  };
  expect_kept();
  options.layer_pattern = "attention,none";
  options.window = 3;
  options.tie_embeddings = options.joint_kv = true;
  options.simple_gate_loop.emplace().prenorm = false;
  expect_kept();
  options.gate_loop_heads = 2;
  options.gate_loop_dim_key = 6;
  options.joint_kv = false;
  options.gate = Gate::kMagnitudePhase;
  options.normalize_input = NormalizeInput::kVariance;
  options.phase_bias = {0.5, 3};
  options.per_key_transitions = true;
  expect_kept();
  options.layers = resolve(options).layers;
  std::get<AttentionSpec>(options.layers[0].mixer).rotary_emb = true;
  expect_kept();
}

TEST(Spec, OlderProgramsReadWhatHasNoNewOption) {
  const std::string json = to_json(small());
  for (const char* name : {"layers", "window", "joint_kv", "tie_embeddings", "simple_gate_loop",
                           "dim_key", "per_key_transitions", "feature_map", "phase_bias"})
    EXPECT_EQ(json.find(name), std::string::npos) << name;
}

TEST(Spec, WhatDoesNotFitIsRefusedByName) {
  expect_refused(R"({"layers": 3})", "layers");
  expect_refused(R"({"layers": []})", "layers");
  expect_refused(R"({"layers": ["mamba"]})", "mamba");
  expect_refused(R"({"layers": [{"heads": 2}]})", "mixer");
  expect_refused(R"({"layers": [{"mixer": "attention", "gate": "polar"}]})", "gate");
  expect_refused(R"({"depth": 1, "layers": ["none", "none"]})", "depth 1");
  expect_refused(R"({"window": 0, "use_gate_looped_attn": false})", "window must be positive");
  expect_refused(R"({"joint_kv": true, "gate_loop_heads": 4})", "joint_kv needs max heads");
  expect_refused(R"({"gate_loop_heads": 3})", "heads must divide dim_inner");
  expect_refused(R"({"simple_gate_loop": true})", "simple_gate_loop");
  expect_refused(R"({"depth": -1})", "depth");
  expect_refused(R"({"depth": 9000000000000000000})", "depth must be at most 65536");
  expect_refused(R"({"depth": 9000000000000000000, "layers": ["none"]})", "depth must be at most");
  expect_refused(R"({"dim": 4000000000})", "dim must be at most");
  expect_refused(R"({"dim": 1000000000, "ff_mult": 2})", "mult must be at most");
  expect_refused(R"({"heads": 1000000, "dim_head": 2000, "use_gate_looped_attn": false})",
                 "heads must be at most");
  expect_refused(R"({"gate_loop_dim_key": 3, "gate_loop_heads": 2})",
                 "heads must divide dim_key, got 2 heads for dim_key 3");
  expect_refused(R"({"gate": "magnitude_phase", "feature_map": "taylor", "gate_loop_heads": 4,
                     "per_key_transitions": true})",
                 "per_key_transitions must be false with the feature map taylor");
  expect_refused(R"({"feature_map": "taylor", "gate_loop_heads": 1, "dim": 1000000})",
                 "keys of a head's state must be at most");
  expect_refused(R"({"phase_bias": [0, 1]})", "phase_bias needs the magnitude_phase gate");
  expect_refused(R"({"ff_mult": 0})", "mult must be positive");
}

TEST(Weights, ProblemsNameEveryWeight) {
  const ModelSpec spec = resolve(small(1));
  std::vector<NamedShape> given;
  for (const Weight& weight : weight_table(spec)) given.push_back({weight.name, weight.shape});
  EXPECT_EQ(weight_problems(spec, given), "");
  given[0].shape = {1};
  given[1].name = "layers.9.0.fn.to_qkv.weight";
  const std::string problems = weight_problems(spec, given);
  for (const char* part :
       {"token_emb.weight is (1), the model's is (256, 8)",
        "missing layers.0.0.fn.to_qkv.weight (24, 8)", "unexpected layers.9.0.fn.to_qkv.weight"})
    EXPECT_NE(problems.find(part), std::string::npos) << problems;
}

TEST(Cost, OnlyFullAttentionGrows) {
  ModelOptions options = small();
  EXPECT_TRUE(has_bounded_state(resolve(options)));
  options.layer_pattern = "gate_loop,attention";
  EXPECT_FALSE(has_bounded_state(resolve(options)));
  EXPECT_EQ(state_size(resolve(options)).per_token, 2 * 2 * 8 * 4);
  options.window = 16;
  EXPECT_TRUE(has_bounded_state(resolve(options)));
  // Three layers of 8 complex channels, two of 16 keys and values of 8 channels.
  EXPECT_EQ(state_size(resolve(options)).fixed, 3 * 8 * 8 + 2 * 16 * 2 * 8 * 4);
}

}  // namespace
}  // namespace gateloop::model
