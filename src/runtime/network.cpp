#include "runtime/network.h"

#include <algorithm>
#include <utility>
#include <variant>

namespace gateloop::runtime {
namespace {

/// Float32 numbers of a cache line: threads that share a row of products write lines of their own.
constexpr std::int64_t kLine = 16;

/// Rows [first, last) of m.
recurrence::Matrix rows_of(const recurrence::Matrix& m, std::int64_t first, std::int64_t last) {
  recurrence::Matrix part = m;
  part.rows = last - first;
  const auto skipped = static_cast<std::size_t>(first * m.columns);
  part.data = static_cast<const std::byte*>(m.data) + skipped * storage_bytes(m.storage);
  if (m.scales != nullptr) part.scales = m.scales + first;
  return part;
}

}  // namespace

void apply(const Norm& norm, const float* x, std::int64_t n, float* to) {
  if (norm.bias != nullptr) return recurrence::layer_norm_row(x, norm.gain, norm.bias, n, to);
  if (norm.gain != nullptr) return recurrence::rms_norm_row(x, norm.gain, n, to);
  if (to != x) std::copy_n(x, n, to);
}

/// Adds the stages of a model in their order. Between layers it keeps what the next stage receives:
/// the sum that the last one left, the norm after that sum, or a simple gate loop to be added.
class Network::Builder {
 public:
  Builder(Network& network, Format format)
      : network_(network), weights_(network.weights_), spec_(network.spec()), format_(format) {}

  void build() {
    network_.embedding_ = matrix("token_emb.weight");
    for (std::size_t i = 0; i < spec_.layers.size(); ++i) add_layer(i);
    Stage stage = receive(spec_.post_norm ? Norm{} : Norm{vector("to_logits.0.gamma"), nullptr});
    stage.output = Output::kLogits;
    if (spec_.tie_embeddings) {
      stage.projections.push_back({.matrix = network_.embedding_});
    } else {
      const char* name = spec_.post_norm ? "to_logits.weight" : "to_logits.1.weight";
      stage.projections.push_back({.matrix = matrix(name)});
    }
    stage.groups = spec_.num_tokens;
    stage.granule = kLine;
    add(std::move(stage));
  }

 private:
  recurrence::Matrix matrix(const std::string& name) {
    const recurrence::Matrix m = weights_.matrix(name, format_);
    network_.weight_bytes_ +=
        m.rows * m.columns * static_cast<std::int64_t>(recurrence::storage_bytes(m.storage)) +
        (m.scales == nullptr ? 0 : 4 * m.rows);
    return m;
  }
  const float* vector(const std::string& name) {
    network_.weight_bytes_ += 4 * weights_.weight(name).shape[0];
    return weights_.vector(name);
  }
  Norm layer_norm(const std::string& name) {
    return {vector(name + ".weight"), vector(name + ".bias")};
  }

  /// The norm of a residual connection, read in order: that before it with pre-norm, that after it
  /// with post-norm.
  struct Residual {
    Norm before, after;
  };
  Residual residual(const std::string& name) {
    if (spec_.post_norm) return {Norm{}, layer_norm(name + "norm")};
    return {Norm{vector(name + "norm.gamma"), nullptr}, Norm{}};
  }

  /// A stage that reads the residual stream.
  Stage receive(Norm before) {
    Stage stage;
    stage.layer = layer_;
    stage.input = next_input_;
    stage.after = std::exchange(next_after_, {});
    stage.before = before;
    stage.input_width = spec_.dim;
    next_input_ = Input::kSum;
    return stage;
  }

  void add_layer(std::size_t index) {
    layer_ = index;
    const model::LayerSpec& layer = spec_.layers[index];
    const std::string name = "layers." + std::to_string(index) + ".";
    if (layer.simple_gate_loop) add_simple(name + "2.", *layer.simple_gate_loop);
    std::visit([&](const auto& mixer) { add_mixer(name + "0.", mixer); }, layer.mixer);
    add_feed_forward(name + "1.", layer.ff_mult * spec_.dim);
  }

  void add_simple(const std::string& name, const model::SimpleGateLoopSpec& simple) {
    Stage stage = receive(simple.prenorm ? Norm{vector(name + "norm.gamma"), nullptr} : Norm{});
    stage.output = Output::kSimple;
    stage.projections.push_back({.matrix = matrix(name + "to_qkva.0.weight"), .blocks = 3});
    stage.groups = spec_.dim;
    stage.granule = kLine;
    add(std::move(stage));
    next_input_ = Input::kSimple;
    if (simple.post_ln) next_after_ = layer_norm(name + "maybe_post_ln");
  }

  void add_mixer(const std::string& name, const model::GateLoopSpec& s) {
    const Residual around = residual(name);
    const std::string fn = name + "fn.";
    Stage stage = receive(around.before);
    stage.output = Output::kGateLoop;
    stage.groups = s.heads;
    stage.granule = s.has_max_heads() ? kLine : 1;
    const recurrence::Matrix qkv = matrix(fn + "to_qkv.weight");
    if (s.dim_keys() == s.dim_inner) {
      stage.projections.push_back(
          {.matrix = qkv, .blocks = s.joint_kv ? 2 : 3, .per_group = s.key_channels()});
    } else {
      const std::int64_t values = 2 * s.dim_keys();
      project(stage,
              {.matrix = rows_of(qkv, 0, values), .blocks = 2, .per_group = s.key_channels()});
      project(stage, {.matrix = rows_of(qkv, values, qkv.rows), .per_group = s.value_channels()});
    }
    project(stage, {.matrix = matrix(fn + "to_a.0.weight"),
                    .bias = vector(fn + "to_a.0.bias"),
                    .per_group = s.transition_parts() * s.transitions() / s.heads});
    stage.transitions = stage.projections.back().column;
    if (s.add_swish_gating) project_gates(stage, fn, s.value_channels());
    const std::int64_t gates = stage.gates;
    add(std::move(stage));

    Stage out = mixed(gates, s.dim_inner);
    if (s.sub_ln) out.after = layer_norm(fn + "maybe_sub_ln");
    if (s.projects(spec_.dim)) out.projections.push_back({.matrix = matrix(fn + "to_out.weight")});
    add(std::move(out));
    next_after_ = around.after;
  }

  void add_mixer(const std::string& name, const model::AttentionSpec& s) {
    const Residual around = residual(name);
    const std::string fn = name + "fn.";
    Stage stage = receive(around.before);
    stage.output = Output::kAttention;
    stage.groups = s.heads;
    if (s.rotary_emb) stage.rotary = vector(fn + "rotary_emb.freqs");
    stage.projections.push_back(
        {.matrix = matrix(fn + "to_qkv.0.weight"), .blocks = 3, .per_group = s.dim_head});
    if (s.data_dependent_rel_pos && !spec_.ablation.state_transition)
      project(stage, {.matrix = matrix(fn + "to_a.0.weight"), .per_group = s.dim_head});
    if (s.add_swish_gating) project_gates(stage, fn, s.dim_head);
    const std::int64_t gates = stage.gates;
    add(std::move(stage));

    Stage out = mixed(gates, s.dim_inner());
    out.projections.push_back(
        {.matrix = matrix(fn + "to_out.1.weight"), .bias = vector(fn + "to_out.1.bias")});
    add(std::move(out));
    next_after_ = around.after;
  }

  void add_mixer(const std::string&, const model::NoMixer&) {}

  void add_feed_forward(const std::string& name, std::int64_t hidden) {
    const Residual around = residual(name);
    Stage expand = receive(around.before);
    expand.output = Output::kHidden;
    expand.groups = hidden;
    expand.granule = kLine;
    expand.projections.push_back(
        {.matrix = matrix(name + "fn.0.weight"), .bias = vector(name + "fn.0.bias")});
    add(std::move(expand));

    Stage contract = sums(Input::kHidden, hidden);
    contract.projections.push_back(
        {.matrix = matrix(name + "fn.2.weight"), .bias = vector(name + "fn.2.bias")});
    add(std::move(contract));
    next_after_ = around.after;
  }

  static void project(Stage& stage, Projection projection) {
    for (const Projection& before : stage.projections) projection.column += before.matrix.rows;
    stage.projections.push_back(projection);
  }
  void project_gates(Stage& stage, const std::string& fn, std::int64_t per_group) {
    project(stage, {.matrix = matrix(fn + "to_gates.0.weight"), .per_group = per_group});
    stage.gates = stage.projections.back().column;
  }

  /// A stage that adds to the residual stream.
  Stage sums(Input input, std::int64_t width) const {
    Stage stage;
    stage.layer = layer_;
    stage.input = input;
    stage.input_width = width;
    stage.output = Output::kSum;
    stage.groups = spec_.dim;
    stage.granule = kLine;
    return stage;
  }
  Stage mixed(std::int64_t gates, std::int64_t inner) const {
    Stage stage = sums(Input::kMixed, inner);
    stage.gates = gates;
    network_.widths_.mixed = std::max(network_.widths_.mixed, inner);
    return stage;
  }

  void add(Stage stage) {
    for (const Projection& p : stage.projections) stage.output_width += p.matrix.rows;
    Widths& widths = network_.widths_;
    widths.input = std::max(widths.input, stage.input_width);
    if (stage.output == Output::kHidden) widths.hidden = std::max(widths.hidden, stage.groups);
    if (mixes(stage.output)) widths.products = std::max(widths.products, stage.output_width);
    network_.stages_.push_back(std::move(stage));
  }

  Network& network_;
  WeightSet& weights_;
  const model::ModelSpec& spec_;
  const Format format_;
  std::size_t layer_ = 0;
  Input next_input_ = Input::kSum;
  Norm next_after_;
};

Network::Network(WeightSet weights, Format format)
    : weights_(std::move(weights)), digest_(weights_.digest()) {
  Builder(*this, format).build();
}

}  // namespace gateloop::runtime
