#pragma once

/// Small models of every kind of layer.
#include <string>
#include <vector>

#include "gateloop/nn/transformer.h"

namespace gateloop::test {

struct Kind {
  std::string name;
  nn::TransformerOptions options;
};

inline nn::TransformerOptions small_options() {
  nn::TransformerOptions options;
  options.dim = 16;
  options.depth = 2;
  options.dim_head = 8;
  options.heads = 2;
  options.ff_mult = 2;
  return options;
}

inline std::vector<Kind> gate_loop_kinds() {
  std::vector<Kind> kinds;
  const auto add = [&](const std::string& name, auto change) {
    auto options = small_options();
    change(options);
    kinds.push_back({name, options});
  };
  using Options = nn::TransformerOptions;
  add("MaxHeads", [](Options&) {});
  add("PostNorm", [](Options& o) { o.post_ln_norm = true; });
  add("FourHeads", [](Options& o) { o.gate_loop_heads = 4; });
  add("WideInner", [](Options& o) { o.dim_gate_looped_attn = 24; });
  add("SubLnNoSwish", [](Options& o) {
    o.sub_ln = true;
    o.attn_add_swish_gating = false;
  });
  add("AblateComplex", [](Options& o) { o.ablate_complex = true; });
  add("AblateTransition", [](Options& o) { o.ablate_state_transition = true; });
  add("Sigmoid", [](Options& o) { o.gate = nn::Gate::kSigmoid; });
  add("SigmoidAverage", [](Options& o) {
    o.gate = nn::Gate::kSigmoid;
    o.normalize_input = true;
    o.transition_bias = {-1.0, 5.0};
  });
  return kinds;
}

inline std::vector<Kind> attention_kinds() {
  std::vector<Kind> kinds;
  const auto add = [&](const std::string& name, auto change) {
    auto options = small_options();
    options.use_gate_looped_attn = false;
    change(options);
    kinds.push_back({name, options});
  };
  using Options = nn::TransformerOptions;
  add("Attention", [](Options&) {});
  add("AttentionRotary", [](Options& o) { o.rotary_emb = true; });
  add("AttentionLinear", [](Options& o) { o.attn_softmax_normalize = false; });
  add("AttentionDataDependent", [](Options& o) { o.data_dependent_rel_pos = true; });
  add("AttentionDataDependentSoftmax", [](Options& o) {
    o.data_dependent_rel_pos = true;
    o.attn_softmax_normalize = true;
    o.rotary_emb = true;
  });
  return kinds;
}

inline std::vector<Kind> all_kinds() {
  auto kinds = gate_loop_kinds();
  for (auto& kind : attention_kinds()) kinds.push_back(kind);
  return kinds;
}

/// In double precision: two ways to the same number then differ by far less than any mistake.
inline nn::Transformer make_model(const nn::TransformerOptions& options, std::uint64_t seed = 1) {
  // Tensors this small gain nothing from a second thread, and waiting for it on a busy machine made
  // the tests take 97 s instead of 0.4 s.
  torch::set_num_threads(1);
  torch::manual_seed(seed);
  nn::Transformer model(options);
  model->to(torch::kFloat64);
  model->eval();
  return model;
}

}  // namespace gateloop::test
