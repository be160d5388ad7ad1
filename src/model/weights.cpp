// The table of a model's weights. Names are the keys of the reference's state_dict.
#include <cmath>
#include <map>
#include <numbers>
#include <numeric>

#include "gateloop/model.h"

namespace gateloop::model {
namespace {

class Table {
 public:
  explicit Table(const ModelSpec& spec) : spec_(spec) {
    add("token_emb.weight", {spec.num_tokens, spec.dim}, Role::kEmbedding);
    for (std::size_t i = 0; i < spec.layers.size(); ++i)
      add_layer("layers." + std::to_string(i) + ".", spec.layers[i]);
    if (spec.post_norm) {
      if (!spec.tie_embeddings) add("to_logits.weight", {spec.num_tokens, spec.dim});
    } else {
      add("to_logits.0.gamma", {spec.dim});
      if (!spec.tie_embeddings) add("to_logits.1.weight", {spec.num_tokens, spec.dim});
    }
  }

  std::vector<Weight> take() { return std::move(weights_); }

 private:
  void add(const std::string& name, std::vector<std::int64_t> shape, Role role) {
    weights_.push_back({name, std::move(shape), role});
  }
  void add(const std::string& name, std::vector<std::int64_t> shape) {
    const Role role = shape.size() == 2 ? Role::kMatrix : Role::kVector;
    add(name, std::move(shape), role);
  }
  void add_layer_norm(const std::string& name, std::int64_t width) {
    add(name + ".weight", {width});
    add(name + ".bias", {width});
  }

  /// A residual connection around `fn`: the weights of its norm follow those of fn.
  void add_norm(const std::string& residual) {
    if (spec_.post_norm) {
      add_layer_norm(residual + "norm", spec_.dim);
    } else {
      add(residual + "norm.gamma", {spec_.dim});
    }
  }

  void add_layer(const std::string& layer, const LayerSpec& spec) {
    if (!std::holds_alternative<NoMixer>(spec.mixer)) {
      std::visit([&](const auto& mixer) { add_mixer(layer + "0.fn.", mixer); }, spec.mixer);
      add_norm(layer + "0.");
    }
    const std::int64_t dim = spec_.dim, hidden = dim * spec.ff_mult;
    add(layer + "1.fn.0.weight", {hidden, dim});
    add(layer + "1.fn.0.bias", {hidden});
    add(layer + "1.fn.2.weight", {dim, hidden});
    add(layer + "1.fn.2.bias", {dim});
    add_norm(layer + "1.");
    if (spec.simple_gate_loop) {
      if (spec.simple_gate_loop->prenorm) add(layer + "2.norm.gamma", {dim});
      add(layer + "2.to_qkva.0.weight", {3 * dim, dim});
      if (spec.simple_gate_loop->post_ln) add_layer_norm(layer + "2.maybe_post_ln", dim);
    }
  }

  void add_mixer(const std::string& fn, const GateLoopSpec& s) {
    const std::int64_t dim = spec_.dim, transitions = s.transition_parts() * s.transitions();
    add(fn + "to_qkv.weight", {(s.joint_kv ? 1 : 2) * s.dim_keys() + s.dim_inner, dim});
    add(fn + "to_a.0.weight", {transitions, dim});
    add(fn + "to_a.0.bias", {transitions});
    if (s.sub_ln) add_layer_norm(fn + "maybe_sub_ln", s.dim_inner);
    if (s.add_swish_gating) add(fn + "to_gates.0.weight", {s.dim_inner, dim});
    if (s.projects(dim)) add(fn + "to_out.weight", {dim, s.dim_inner});
  }
  void add_mixer(const std::string& fn, const AttentionSpec& s) {
    const std::int64_t dim = spec_.dim, inner = s.dim_inner();
    if (s.rotary_emb) add(fn + "rotary_emb.freqs", {s.dim_head / 2}, Role::kConstant);
    add(fn + "to_qkv.0.weight", {3 * inner, dim});
    if (s.data_dependent_rel_pos) add(fn + "to_a.0.weight", {inner, dim});
    if (s.add_swish_gating) add(fn + "to_gates.0.weight", {inner, dim});
    add(fn + "to_out.1.weight", {dim, inner});
    add(fn + "to_out.1.bias", {dim});
  }
  void add_mixer(const std::string&, const NoMixer&) {}

  const ModelSpec& spec_;
  std::vector<Weight> weights_;
};

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (const std::int64_t size : shape)
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

}  // namespace

std::int64_t Weight::numel() const {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

std::vector<double> initial_transition_bias(const GateLoopSpec& spec) {
  if (!spec.transition_bias && !spec.phase_bias) return {};
  const std::int64_t count = spec.transitions(), parts = spec.transition_parts();
  std::vector<double> bias(static_cast<std::size_t>(count * parts));
  const auto [first, last] = spec.transition_bias.value_or(std::pair(0.0, 0.0));
  const auto [low, high] = spec.phase_bias.value_or(std::pair(0.0, 0.0));
  for (std::int64_t i = 0; i < count; ++i) {
    const auto step = static_cast<double>(i);
    double* const to = bias.data() + i * parts;
    to[0] = count == 1 ? first : first + (last - first) * step / static_cast<double>(count - 1);
    if (parts == 2) to[1] = low + (high - low) * std::fmod(step * std::numbers::phi, 1.0);
  }
  return bias;
}

std::vector<Weight> weight_table(const ModelSpec& spec) { return Table(spec).take(); }

std::string weight_problems(const ModelSpec& spec, const std::vector<NamedShape>& given) {
  std::vector<NamedShape> expected;
  for (const Weight& weight : weight_table(spec)) expected.push_back({weight.name, weight.shape});
  return weight_problems(expected, given);
}

std::string weight_problems(const std::vector<NamedShape>& expected,
                            const std::vector<NamedShape>& given) {
  std::map<std::string, const std::vector<std::int64_t>*> unexpected;
  for (const NamedShape& weight : given) unexpected.emplace(weight.name, &weight.shape);
  std::string problems;
  const auto note = [&](const std::string& problem) {
    problems += (problems.empty() ? "" : "; ") + problem;
  };
  for (const NamedShape& weight : expected) {
    const auto found = unexpected.find(weight.name);
    if (found == unexpected.end()) {
      note("missing " + weight.name + " " + text_of(weight.shape));
      continue;
    }
    if (*found->second != weight.shape)
      note(weight.name + " is " + text_of(*found->second) + ", the model's is " +
           text_of(weight.shape));
    unexpected.erase(found);
  }
  for (const auto& [name, shape] : unexpected) note("unexpected " + name + " " + text_of(*shape));
  return problems.empty() ? problems : "these weights are not this model's: " + problems;
}

}  // namespace gateloop::model
