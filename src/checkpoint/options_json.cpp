#include <stdexcept>
#include <string>

#include "checkpoint/json_fields.h"
#include "checkpoint/parse_json.h"
#include "gateloop/checkpoint.h"

namespace gateloop::nn {

/// Every field of TransformerOptions, once; found by argument-dependent lookup.
template <typename Options, typename Visitor>
requires std::is_same_v<std::remove_const_t<Options>, TransformerOptions>
void for_each_field(Options& options, Visitor&& visit) {
  visit("num_tokens", options.num_tokens);
  visit("dim", options.dim);
  visit("depth", options.depth);
  visit("dim_head", options.dim_head);
  visit("heads", options.heads);
  visit("ff_mult", options.ff_mult);
  visit("checkpoint_gate_looped_attn", options.checkpoint_gate_looped_attn);
  visit("use_gate_looped_attn", options.use_gate_looped_attn);
  visit("gate_loop_heads", options.gate_loop_heads);
  visit("attn_add_swish_gating", options.attn_add_swish_gating);
  visit("dim_gate_looped_attn", options.dim_gate_looped_attn);
  visit("attn_softmax_normalize", options.attn_softmax_normalize);
  visit("data_dependent_rel_pos", options.data_dependent_rel_pos);
  visit("frac_gradient_state_transition", options.frac_gradient_state_transition);
  visit("ablate_complex", options.ablate_complex);
  visit("ablate_state_transition", options.ablate_state_transition);
  visit("rotary_emb", options.rotary_emb);
  visit("post_ln_norm", options.post_ln_norm);
  visit("sub_ln", options.sub_ln);
  visit("gate", options.gate);
  visit("normalize_input", options.normalize_input);
  visit("transition_bias", options.transition_bias);
}

}  // namespace gateloop::nn

namespace gateloop::checkpoint {

std::string to_json(const nn::TransformerOptions& options) {
  return json_fields::encode_fields(options).dump(2);
}

nn::TransformerOptions options_from_json(const std::string& text) {
  nn::TransformerOptions options;
  try {
    json_fields::decode_fields(parse_json<json_fields::json>(text), options);
  } catch (const std::exception& error) {  // of the JSON parser or of a field
    throw std::runtime_error(std::string("model: ") + error.what());
  }
  return options;
}

}  // namespace gateloop::checkpoint
