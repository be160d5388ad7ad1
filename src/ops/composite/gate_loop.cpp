/// GateLoop in torch's operators: step by step, and as surrogate attention (arXiv 2311.01927,
/// section 3.3) in tiles. At most one row of tiles is in memory.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "gateloop/ops.h"
#include "ops/autograd/gradients.h"
#include "ops/checks.h"
#include "ops/composite/heads.h"
#include "ops/internal.h"

namespace gateloop::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Steps of a tile, of whose rows one is in memory. With transitions per key a tile on the diagonal
/// takes as much for every key.
std::int64_t tile_steps(const at::Tensor& a) { return a.dim() == 4 ? 32 : 128; }

/// y of the steps from `first` on, which are q's; k, v and a are those of all steps up to them.
/// Decays of pairs in one tile are products of their own. Decays of pairs further apart have three
/// factors: from the earlier step to its tile's end, over the tiles between, and into the later
/// one. None divides.
at::Tensor attention_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& a, const OptionalTensor& initial_state,
                          std::int64_t first) {
  const std::int64_t steps = q.size(1);
  const at::Tensor own = a.narrow(1, first, steps);
  const at::Tensor queries = by_head(q), keys = by_head(k), values = by_head(v);
  const at::Tensor inside = scores_inside(queries, keys.narrow(2, first, steps), own);
  at::Tensor y = at::matmul(inside, values.narrow(2, first, steps));
  at::Tensor reached = queries * by_head(products_to(own));  // q times the decay from a tile's end
  const std::int64_t tile = tile_steps(a);
  for (std::int64_t begin = first - tile; begin >= 0; begin -= tile) {
    const at::Tensor there = a.narrow(1, begin, tile);
    const at::Tensor left = keys.narrow(2, begin, tile) * by_head(products_after(there));
    y = y + at::matmul(scores_of(reached, left), values.narrow(2, begin, tile));
    reached = reached * by_head(products_to(there)).narrow(2, tile - 1, 1);
  }
  if (is_given(initial_state)) {
    y = y + scores_of(reached, initial_state->transpose(-1, -2));
  }
  return y.transpose(1, 2);
}

/// Calls row(first, steps) for every row of tiles.
template <class Row>
void for_each_row(const at::Tensor& a, const Row& row) {
  const std::int64_t time = a.size(1), tile = tile_steps(a);
  for (std::int64_t first = 0; first < time; first += tile) {
    row(first, std::min(tile, time - first));
  }
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& v, const at::Tensor& a,
                                             const OptionalTensor& initial_state, bool reverse) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_wide_gate_loop("gateloop::_attention_gate_loop", q, k, v, a, initial_state, {});
  const Turned in = turned(q, k, v, a, reverse);
  const std::int64_t time = q.size(1);
  if (time == 0) {
    const bool given = is_given(initial_state);
    return {at::empty_like(v),
            given ? initial_state->clone()
                  : at::zeros({q.size(0), q.size(2), q.size(3), v.size(3)}, a.options())};
  }
  std::vector<at::Tensor> rows;
  for_each_row(in.a, [&](std::int64_t first, std::int64_t steps) {
    const std::int64_t end = first + steps;
    rows.push_back(attention_rows(in.q.narrow(1, first, steps), in.k.narrow(1, 0, end),
                                  in.v.narrow(1, 0, end), in.a.narrow(1, 0, end), initial_state,
                                  first));
  });
  const at::Tensor y = at::cat(rows, 1);
  return {(reverse ? y.flip(1) : y).to(v.scalar_type()),
          state_after(in.k, in.v, in.a, initial_state)};
}

/// q, k and v in the type of sums, with a graph under create_graph; the others as they are.
variable_list wide_of(variable_list inputs) {
  for (std::size_t i = 0; i < 3; ++i) {
    const bool needed = inputs[i].requires_grad();
    const at::Tensor wide = inputs[i].to(accumulation_type(inputs[i].scalar_type()));
    inputs[i] = wide.requires_grad() == needed ? wide : wide.detach().requires_grad_(needed);
  }
  return inputs;
}

/// Holds the arguments; the backward pass computes one row of tiles at a time again.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v, const at::Tensor& a,
                               const OptionalTensor& initial_state, bool reverse) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({q, k, v, a, initial_state.value_or(at::Tensor())});
    ctx->saved_data["reverse"] = reverse;
    ctx->set_materialize_grads(false);
    auto [y, final_state] = attention_gate_loop(q, k, v, a, initial_state, reverse);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto saved = ctx->get_saved_variables();
    const bool reverse = ctx->saved_data["reverse"].toBool();
    const std::int64_t time = saved[0].size(1);
    // Gradients of rows are summed before they are rounded to the type of an argument.
    const variable_list inputs = wide_of(saved);
    variable_list total(inputs.size());
    const auto add = [&](const variable_list& part) {
      for (std::size_t i = 0; i < part.size(); ++i) {
        if (part[i].defined()) total[i] = total[i].defined() ? total[i] + part[i] : part[i];
      }
    };
    if (grads[1].defined()) {
      add(differentiate(
          [&](const variable_list& in) -> variable_list {
            const Turned t = turned(in[0], in[1], in[2], in[3], reverse);
            return {time == 0 ? in[4] : state_after(t.k, t.v, t.a, in[4])};
          },
          inputs, {grads[1]}));
    }
    if (grads[0].defined()) {
      const at::Tensor dy =
          (reverse ? grads[0].flip(1) : grads[0]).to(accumulation_type(saved[2].scalar_type()));
      for_each_row(inputs[3], [&](std::int64_t first, std::int64_t steps) {
        const std::int64_t end = first + steps;
        add(differentiate(
            [&](const variable_list& in) -> variable_list {
              const Turned t = turned(in[0], in[1], in[2], in[3], reverse);
              const at::Tensor y =
                  attention_rows(t.q.narrow(1, first, steps), t.k.narrow(1, 0, end),
                                 t.v.narrow(1, 0, end), t.a.narrow(1, 0, end), in[4], first);
              return {y};
            },
            inputs, {dy.narrow(1, first, steps)}));
      });
    }
    for (std::size_t i = 0; i < total.size(); ++i) {
      if (total[i].defined()) total[i] = total[i].to(saved[i].scalar_type());
    }
    total.emplace_back();
    return total;
  }
};

std::tuple<at::Tensor, at::Tensor> attention_autograd(const at::Tensor& q, const at::Tensor& k,
                                                      const at::Tensor& v, const at::Tensor& a,
                                                      const OptionalTensor& initial_state,
                                                      bool reverse) {
  if (needs_pieces({q, k, v, a, initial_state}))
    return attention(q, k, v, a, initial_state, reverse);
  const auto result = AttentionFunction::apply(q, k, v, a, initial_state, reverse);
  return {result[0], result[1]};
}

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
                                                      bool reverse) {
  const bool given = is_given(initial_state);
  at::Tensor state =
      given ? *initial_state : at::zeros({q.size(0), q.size(2), q.size(3), v.size(3)}, a.options());
  const std::int64_t time = q.size(1);
  std::vector<at::Tensor> ys(static_cast<std::size_t>(time));
  for (std::int64_t s = 0; s < time; ++s) {
    const std::int64_t t = reverse ? time - 1 - s : s;
    std::tie(ys[static_cast<std::size_t>(t)], state) =
        gate_loop_step(q.select(1, t), k.select(1, t), v.select(1, t), a.select(1, t), state);
  }
  if (time == 0) return {v.clone(), state.clone()};
  return {at::stack(ys, 1), state};
}

TORCH_LIBRARY_IMPL(gateloop, CompositeExplicitAutograd, m) {
  m.impl("_attention_gate_loop", attention);
}
TORCH_LIBRARY_IMPL(gateloop, Autograd, m) { m.impl("_attention_gate_loop", attention_autograd); }

}  // namespace gateloop::ops
