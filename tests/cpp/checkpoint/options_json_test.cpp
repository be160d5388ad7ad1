#include <gtest/gtest.h>

#include <string>

#include "gateloop/checkpoint.h"

namespace gateloop::checkpoint {
namespace {

using nn::Gate;
using nn::TransformerOptions;

TEST(OptionsJson, WritesEveryFieldUnderItsName) {
  const std::string json = model::to_json(TransformerOptions{});
  for (const char* name : {"num_tokens",
                           "dim",
                           "depth",
                           "dim_head",
                           "heads",
                           "ff_mult",
                           "checkpoint_gate_looped_attn",
                           "use_gate_looped_attn",
                           "gate_loop_heads",
                           "attn_add_swish_gating",
                           "dim_gate_looped_attn",
                           "attn_softmax_normalize",
                           "data_dependent_rel_pos",
                           "frac_gradient_state_transition",
                           "ablate_complex",
                           "ablate_state_transition",
                           "rotary_emb",
                           "post_ln_norm",
                           "sub_ln",
                           "gate",
                           "normalize_input",
                           "transition_bias"}) {
    std::string key = "\"";
    (key += name) += "\":";
    EXPECT_NE(json.find(key), std::string::npos) << name;
  }
  EXPECT_NE(json.find("\"gate\": \"polar\""), std::string::npos) << json;
  EXPECT_NE(json.find("\"transition_bias\": null"), std::string::npos) << json;
}

/// Every field away from its default, so that a field mixed up with another shows.
TransformerOptions unusual() {
  TransformerOptions options;
  options.num_tokens = 1;
  options.dim = 2;
  options.depth = 3;
  options.dim_head = 4;
  options.heads = 5;
  options.ff_mult = 7;
  options.checkpoint_gate_looped_attn = false;
  options.use_gate_looped_attn = false;
  options.gate_loop_heads = 8;
  options.attn_add_swish_gating = false;
  options.dim_gate_looped_attn = 9;
  options.attn_softmax_normalize = false;
  options.data_dependent_rel_pos = true;
  options.frac_gradient_state_transition = 0.1;
  options.ablate_complex = true;
  options.ablate_state_transition = true;
  options.rotary_emb = true;
  options.post_ln_norm = true;
  options.sub_ln = true;
  options.gate = Gate::kSigmoid;
  options.normalize_input = model::NormalizeInput::kMean;
  options.transition_bias = {-1.5, 1.0 / 3};
  return options;
}

TEST(OptionsJson, RoundTrips) {
  const std::string json = model::to_json(unusual());
  const TransformerOptions read = model::options_from_json(json);
  EXPECT_EQ(model::to_json(read), json);
  EXPECT_EQ(read.depth, 3);
  EXPECT_EQ(read.gate_loop_heads, 8);
  EXPECT_EQ(read.attn_softmax_normalize, false);
  EXPECT_EQ(read.gate, Gate::kSigmoid);
  EXPECT_EQ(read.transition_bias, std::pair(-1.5, 1.0 / 3));  // the same bits
  EXPECT_EQ(model::to_json(model::options_from_json(model::to_json(TransformerOptions{}))),
            model::to_json(TransformerOptions{}));
}

TEST(OptionsJson, AbsentFieldsKeepTheirDefaults) {
  const TransformerOptions read = model::options_from_json(R"({"dim": 64})");
  EXPECT_EQ(read.dim, 64);
  EXPECT_EQ(read.depth, TransformerOptions{}.depth);
}

TEST(OptionsJson, ErrorsNameTheField) {
  const std::pair<std::string, const char*> cases[] = {
      {R"({"dimm": 64})", "unknown option \"dimm\""},
      {R"({"dim": "64"})", "\"dim\" must be an integer"},
      {R"({"dim": 64.5})", "\"dim\" must be an integer"},
      {R"({"dim": null})", "\"dim\" must be an integer"},
      {R"({"sub_ln": 1})", "\"sub_ln\" must be true or false"},
      {R"({"frac_gradient_state_transition": true})", "must be a number"},
      {R"({"gate": "square"})", "must be one of \"polar\", \"sigmoid\", \"magnitude_phase\""},
      {R"({"normalize_input": "median"})", "must be one of \"none\", \"mean\", \"variance\""},
      {R"({"feature_map": "taylr"})", "must be one of \"none\", \"taylor\""},
      {R"({"transition_bias": [1]})", "must be a pair"},
      {R"({"transition_bias": 1})", "must be a pair"},
      {R"([])", "not a JSON object"},
      {R"({"dim":)", "parse error"},
      {R"({"dim":)" + std::string(300'000, '[') + std::string(300'000, ']') + "}",
       "levels or deeper"},
  };
  for (const auto& [json, expected] : cases) {
    try {
      model::options_from_json(json);
      ADD_FAILURE() << json;
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace gateloop::checkpoint
