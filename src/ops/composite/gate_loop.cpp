/// GateLoop in torch's operators: step by step, and as surrogate attention (arXiv 2311.01927,
/// section 3.3) in tiles. One tile of pairs is in memory, and one of features.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/composite/definition.h"
#include "ops/composite/features.h"
#include "ops/composite/heads.h"
#include "ops/internal.h"
#include "ops/meta/shapes.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr auto kGateLoop = "gateloop::gate_loop";

/// initial_state, or zeros.
at::Tensor state_before(const at::Tensor& q, const at::Tensor& v, const at::Tensor& a,
                        const OptionalTensor& initial_state, recurrence::FeatureMap map) {
  if (is_given(initial_state)) return *initial_state;
  return at::zeros({q.size(0), q.size(2), state_keys(q, map).expect_int(), v.size(3)}, a.options());
}

/// What differentiate() takes: with its graph under create_graph, else a leaf where `needed`.
at::Tensor leaf(const at::Tensor& t, bool needed) {
  return at::GradMode::is_enabled() ? t : t.detach().requires_grad_(needed);
}

/// Steps of a tile. With transitions per key a tile on the diagonal has one product for every key.
std::int64_t tile_steps(const at::Tensor& a) { return a.dim() == 4 ? 32 : 128; }

// A reader is a tile of queries, or the state after the last step, which has none. Decays of pairs
// in one tile are products of their own. Decays from an earlier tile have three factors: from the
// earlier step to its tile's end, over the tiles between, and into the reader. None divides.

/// Decays of a tile: up to each step, that included, after each step, and over all, (B, H, steps or
/// 1, 1 or K).
variable_list factors_of(const at::Tensor& a) {
  const at::Tensor to = by_head(products_to(a));
  return {to, by_head(products_after(a)), to.narrow(2, a.size(1) - 1, 1)};
}

/// `in`: q, k, v, a of a tile. -> what its queries read of its own steps, and its factors.
variable_list read_own(const variable_list& in, c10::string_view map) {
  const at::Tensor scores = scores_inside(by_head(in[0]), by_head(in[1]), in[3], map);
  variable_list found = {at::matmul(scores, by_head(in[2]))};
  for (auto& factor : factors_of(in[3])) found.push_back(std::move(factor));
  return found;
}

/// `in`: the reader's queries; k and v of an earlier tile and its last two factors; the decay from
/// that tile's end into the reader. -> what the reader reads, and the decay from the tile's begin.
variable_list read_tile(const variable_list& in, c10::string_view map) {
  const at::Tensor &q = in[0], &after = in[3], &reached = in[5];
  const at::Tensor values = by_head(in[2]), further = reached * in[4];
  if (!q.defined()) {
    const at::Tensor kept = by_head(features(in[1], map)) * after;
    return {reached.transpose(-1, -2) * written(kept, values), further};
  }
  const at::Tensor queries = by_head(q), keys = by_head(in[1]);
  const bool per_key = map == "none" && after.size(-1) == keys.size(-1);
  const at::Tensor scores =
      per_key ? scores_of(queries * reached, keys * after)
              : products_of_features(at::matmul(queries, keys.transpose(-1, -2)), map) *
                    scores_of(reached, after);
  return {at::matmul(scores, values), further};
}

/// `in`: the reader's queries, the decay from the begin into it, the initial state.
variable_list read_initial(const variable_list& in, c10::string_view map) {
  if (!in[0].defined()) return {in[1].transpose(-1, -2) * in[2]};
  return {scores_of(by_head(features(in[0], map)) * in[1], in[2].transpose(-1, -2))};
}

/// Calls tile(first, steps) for every tile.
template <class Tile>
void for_each_tile(const at::Tensor& a, const Tile& tile) {
  const std::int64_t time = a.size(1), longest = tile_steps(a);
  for (std::int64_t first = 0; first < time; first += longest) {
    tile(first, std::min(longest, time - first));
  }
}

/// From the end of the last tile into the state after it.
at::Tensor no_decay(const at::Tensor& a) {
  return at::ones({a.size(0), a.size(2), 1, a.dim() == 4 ? a.size(3) : 1}, a.options());
}

void add(at::Tensor& total, const at::Tensor& part) {
  if (part.defined()) total = total.defined() ? total + part : part;
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const OptionalTensor& initial_state, bool reverse,
                                             c10::string_view feature_map) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  constexpr auto kOp = "gateloop::_attention_gate_loop";
  const auto map = feature_map_of(kOp, feature_map);
  check_wide_gate_loop(kOp, q, k, v, a, initial_state, {}, map);
  if (q.size(1) == 0) return {at::empty_like(v), state_before(q, v, a, initial_state, map).clone()};
  const Turned in = turned(q, k, v, a, reverse);
  std::vector<variable_list> tiles;  // k, v, and the factors after each step and over all
  const auto read_before = [&](const at::Tensor& queries, at::Tensor reached, at::Tensor& sum) {
    for (std::size_t i = tiles.size(); i-- > 0;) {
      const variable_list& tile = tiles[i];
      auto found = read_tile({queries, tile[0], tile[1], tile[2], tile[3], reached}, feature_map);
      add(sum, found[0]);
      reached = std::move(found[1]);
    }
    if (is_given(initial_state)) {
      add(sum, read_initial({queries, reached, *initial_state}, feature_map)[0]);
    }
  };
  std::vector<at::Tensor> rows;
  for_each_tile(in.a, [&](std::int64_t first, std::int64_t steps) {
    const auto part = [&](const at::Tensor& t) { return t.narrow(1, first, steps); };
    const variable_list own = {part(in.q), part(in.k), part(in.v), part(in.a)};
    auto found = read_own(own, feature_map);
    read_before(own[0], found[1], found[0]);
    rows.push_back(found[0].transpose(1, 2));
    tiles.push_back({own[1], own[2], found[2], found[3]});
  });
  at::Tensor final_state;
  read_before({}, no_decay(a), final_state);
  const at::Tensor y = at::cat(rows, 1);
  return {(reverse ? y.flip(1) : y).to(v.scalar_type()), final_state};
}

/// The backward pass of attention: one tile of queries and one of keys at a time, computed again.
class AttentionGradients {
 public:
  /// `inputs`: q, k, v, a, initial_state, which may be undefined. T is not 0.
  AttentionGradients(const variable_list& inputs, bool reverse, const std::string& map)
      : map_(map), learns_(inputs[3].requires_grad()), initial_(inputs[4]) {
    if (initial_.defined()) initial_ = leaf(initial_, initial_.requires_grad());
    const Turned in = turned(inputs[0], inputs[1], inputs[2], inputs[3], reverse);
    const variable_list turned_inputs = {in.q, in.k, in.v, in.a};
    for_each_tile(in.a, [&](std::int64_t first, std::int64_t steps) {
      variable_list tile;
      for (std::size_t i = 0; i < turned_inputs.size(); ++i) {
        const at::Tensor part = turned_inputs[i].narrow(1, first, steps);
        tile.push_back(leaf(part, inputs[i].requires_grad()));
      }
      variable_list factors;
      for (const auto& factor : factors_of(tile[3])) factors.push_back(leaf(factor, learns_));
      tiles_.push_back(
          {std::move(tile), std::move(factors), variable_list(4), variable_list(3), {}});
    });
  }

  /// dy in scan order and in the type of sums; one of the two may be undefined.
  void run(const at::Tensor& dy, const at::Tensor& dfinal_state) {
    if (dfinal_state.defined()) {
      at::Tensor none;
      read_back({}, none, leaf(no_decay(tiles_[0].inputs[3]), false), tiles_.size(), dfinal_state);
    }
    std::int64_t first = 0;
    for (std::size_t i = 0; i < tiles_.size(); ++i) {
      if (!dy.defined()) break;
      Tile& row = tiles_[i];
      const std::int64_t steps = row.inputs[0].size(1);
      row.dread = by_head(dy.narrow(1, first, steps));
      first += steps;
      add(row.dfactors[0], read_back(row.inputs[0], row.dinputs[0], row.factors[0], i, row.dread));
    }
    for (Tile& tile : tiles_) {
      const auto found =
          differentiate([&](const variable_list& in) { return read_own(in, map_); }, tile.inputs,
                        {tile.dread, tile.dfactors[0], tile.dfactors[1], tile.dfactors[2]});
      for (std::size_t i = 0; i < found.size(); ++i) add(tile.dinputs[i], found[i]);
    }
  }

  /// Of input i, (B, T, ...) in scan order.
  at::Tensor sequence(std::size_t i) const {
    std::vector<at::Tensor> parts;
    for (const Tile& tile : tiles_) {
      const at::Tensor& part = tile.dinputs[i];
      parts.push_back(part.defined() ? part : at::zeros_like(tile.inputs[i]));
    }
    return at::cat(parts, 1);
  }
  const at::Tensor& initial_state() const { return dinitial_; }

 private:
  /// Copies what it keeps, once all that a tile took is free: between those numbers a kept one
  /// would split memory that the next tile takes whole. 4,096 steps took 95 MiB, not 30.
  static void add(at::Tensor& total, const at::Tensor& part) {
    if (part.defined()) total = total.defined() ? total + part : part.clone();
  }

  struct Tile {
    variable_list inputs, factors, dinputs, dfactors;
    at::Tensor dread;
  };

  /// Gradients from what a reader read of the first `count` tiles and of the initial state; those
  /// of its queries go into dq. Returns that of `reached`.
  at::Tensor read_back(const at::Tensor& q, at::Tensor& dq, const at::Tensor& reached,
                       std::size_t count, const at::Tensor& dread) {
    variable_list decays = {reached};  // from the begin of a tile into the reader, the last first
    for (std::size_t i = count; i-- > 0;) {
      decays.push_back(leaf(decays.back() * tiles_[i].factors[2], learns_));
    }
    at::Tensor dreached;
    if (initial_.defined()) {
      const auto found =
          differentiate([&](const variable_list& in) { return read_initial(in, map_); },
                        {q, decays.back(), initial_}, {dread});
      add(dq, found[0]);
      dreached = found[1];
      add(dinitial_, found[2]);
    }
    for (std::size_t i = 0; i < count; ++i) {
      Tile& tile = tiles_[i];
      const auto found = differentiate([&](const variable_list& in) { return read_tile(in, map_); },
                                       {q, tile.inputs[1], tile.inputs[2], tile.factors[1],
                                        tile.factors[2], decays[count - 1 - i]},
                                       {dread, dreached});
      add(dq, found[0]);
      add(tile.dinputs[1], found[1]);
      add(tile.dinputs[2], found[2]);
      add(tile.dfactors[1], found[3]);
      add(tile.dfactors[2], found[4]);
      dreached = found[5];
    }
    return dreached;
  }

  const std::string map_;
  const bool learns_;  // whether transitions need gradients
  at::Tensor initial_, dinitial_;
  std::vector<Tile> tiles_;
};

/// Holds the arguments alone.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& a,
                               const OptionalTensor& initial_state, bool reverse,
                               c10::string_view feature_map) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({q, k, v, a, initial_state.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["feature_map"] = std::string(feature_map);
    ctx->set_materialize_grads(false);
    auto [y, final_state] = attention_gate_loop(q, k, v, a, initial_state, reverse, feature_map);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const bool reverse = ctx->saved_data["reverse"].toBool();
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    if (saved[0].size(1) == 0) {
      if (saved[4].defined()) result[4] = grads[1];
      return result;
    }
    AttentionGradients gradients(saved, reverse, ctx->saved_data["feature_map"].toStringRef());
    at::Tensor dy = grads[0];
    if (dy.defined()) {
      dy = (reverse ? dy.flip(1) : dy).to(accumulation_type(saved[2].scalar_type()));
    }
    gradients.run(dy, grads[1]);
    for (std::size_t i = 0; i < 4; ++i) {
      if (!saved[i].requires_grad()) continue;
      const at::Tensor whole = gradients.sequence(i);
      // Gradients of tiles are summed before they are rounded to the type of an argument.
      result[i] = (reverse ? whole.flip(1) : whole).to(saved[i].scalar_type());
    }
    result[4] = gradients.initial_state();
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> attention_autograd(const at::Tensor& q, const at::Tensor& k,
                                                      const at::Tensor& v, const at::Tensor& a,
                                                      const OptionalTensor& initial_state,
                                                      bool reverse, c10::string_view feature_map) {
  if (needs_pieces({q, k, v, a, initial_state}))
    return attention(q, k, v, a, initial_state, reverse, feature_map);
  const auto result = AttentionFunction::apply(q, k, v, a, initial_state, reverse, feature_map);
  return {result[0], result[1]};
}

/// One step after another. The states of every √T steps are kept: a backward pass computes about as
/// many steps again at a time.
Definition recurrent_definition(const at::Tensor& q, const at::Tensor& v, const at::Tensor& a,
                                bool reverse, c10::string_view feature_map) {
  const auto map = feature_map_of(kGateLoop, feature_map);
  const std::int64_t heads = q.size(2), keys = state_keys(q, map).expect_int(), values = v.size(3);
  const auto block =
      std::max<std::int64_t>(1, std::llround(std::ceil(std::sqrt(static_cast<double>(q.size(1))))));
  const auto compute = [block, reverse, map = std::string(feature_map)](
                           const variable_list& in, const at::Tensor& initial_state,
                           const OptionalTensor&) -> Definition::Results {
    const std::int64_t time = in[0].size(1);
    // Not select(): the gradient of each would be as large as the span.
    std::vector<variable_list> steps;
    for (const at::Tensor& sequence : in) steps.push_back(sequence.unbind(1));
    variable_list ys(static_cast<std::size_t>(time)), before;
    at::Tensor state = initial_state;
    for (std::int64_t s = 0; s < time; ++s) {
      if (s % block == 0) before.push_back(state);
      const std::int64_t t = reverse ? time - 1 - s : s;
      const auto step = [&](std::size_t i) { return steps[i][static_cast<std::size_t>(t)]; };
      std::tie(ys[static_cast<std::size_t>(t)], state) =
          gate_loop_step(features(step(0), map), features(step(1), map), step(2), step(3), state);
    }
    return {at::stack(ys, 1), state, at::stack(before, 1)};
  };
  return {.op = kGateLoop,
          .compute = compute,
          .like = 2,
          .sizes = {heads, keys, values},
          .dtype = a.scalar_type(),
          .reverse = reverse,
          .block = block,
          .width = 2 * heads * keys * values};  // what is written, and the state
}

struct StepsFunction : torch::autograd::Function<StepsFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& a, const at::Tensor& state,
                               bool reverse, c10::string_view feature_map) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto definition = recurrent_definition(q, v, a, reverse, feature_map);
    auto sizes = state.sizes().vec();
    sizes.insert(sizes.begin() + 1, (q.size(1) + definition.block - 1) / definition.block);
    const Definition::Results outputs{empty_sequence(v), at::empty(state.sizes(), state.options()),
                                      at::empty(sizes, state.options())};
    compute_in_spans(definition, {q, k, v, a}, state, {}, outputs);
    ctx->save_for_backward({q, k, v, a, state, outputs.states});
    ctx->saved_data["reverse"] = reverse;
    ctx->saved_data["feature_map"] = std::string(feature_map);
    ctx->set_materialize_grads(false);
    return {outputs.y, outputs.final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list result(7);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list sequences(saved.begin(), saved.begin() + 4);
    const at::Tensor& state = saved[4];
    const std::string map = ctx->saved_data["feature_map"].toStringRef();
    const auto definition = recurrent_definition(saved[0], saved[2], saved[3],
                                                 ctx->saved_data["reverse"].toBool(), map);
    if (needs_pieces_backward(
            {grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], state})) {
      const auto compute = [&](const variable_list& in) {
        return compute_whole(definition, {in.begin(), in.begin() + 4}, in[4], {});
      };
      result = differentiate(compute, {saved.begin(), saved.begin() + 5}, grads);
    } else {
      result.clear();
      for (const auto& t : sequences) result.push_back(empty_sequence(t));
      result.push_back(at::empty(state.sizes(), state.options()));
      differentiate_in_spans(kGateLoop, definition, sequences, saved[5], grads[0], grads[1], {},
                             result);
    }
    result.resize(7);
    return result;
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> gate_loop_step(const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& v, const at::Tensor& a,
                                                  const at::Tensor& state) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto real = accumulation_type(q.scalar_type());
  const at::Tensor written = k.to(real).unsqueeze(-1) * v.to(real).unsqueeze(-2);
  const at::Tensor per_key = a.dim() == k.dim() ? a : a.unsqueeze(-1);
  const at::Tensor next = per_key.unsqueeze(-1) * state + written;
  const at::Tensor y = at::matmul(q.to(real).unsqueeze(-2), real_part(next)).squeeze(-2);
  return {y.to(v.scalar_type()), next};
}

std::tuple<at::Tensor, at::Tensor> gate_loop_by_steps(const at::Tensor& q, const at::Tensor& k,
                                                      const at::Tensor& v, const at::Tensor& a,
                                                      const OptionalTensor& initial_state,
                                                      bool reverse, c10::string_view feature_map) {
  const auto map = feature_map_of(kGateLoop, feature_map);
  const at::Tensor state = state_before(q, v, a, initial_state, map);
  const auto result = needs_pieces({q, k, v, a, state})
                          ? compute_whole(recurrent_definition(q, v, a, reverse, feature_map),
                                          {q, k, v, a}, state, {})
                          : StepsFunction::apply(q, k, v, a, state, reverse, feature_map);
  return {result[0], result[1]};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("_attention_gate_loop", attention);
}
TORCH_LIBRARY_IMPL(gateloop, Autograd, m) { m.impl("_attention_gate_loop", attention_autograd); }

}  // namespace gateloop::ops
