#include "distributed/time_sharded.h"

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "distributed/group.h"
#include "ops/autograd/gradients.h"
#include "ops/internal.h"

namespace gateloop::distributed {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The product is taken of so many steps first, then of twice as many more, until it is zero.
constexpr std::int64_t kFirstSteps = 512;

/// What the pass forward and the pass back of one call share, beside tensors.
struct Call : torch::CustomClassHolder {
  Call(const char* name, std::unique_ptr<LocalRecurrence> local, TimeBlock where,
       bool differentiable)
      : op(name),
        recurrence(std::move(local)),
        block(std::move(where)),
        needs_gradients(differentiable) {}

  const char* op;
  std::unique_ptr<LocalRecurrence> recurrence;
  TimeBlock block;
  bool needs_gradients;

  LocalRecurrence::Outputs forward(const Piece& piece, const Tensors& sequences,
                                   const OptionalTensor& initial_state, bool keep) const {
    return recurrence->forward(piece.of(sequences), initial_state, block.cu_seqlens(piece), keep);
  }
  at::Tensor product(const Piece& piece, const Tensors& sequences) const {
    return recurrence->product(piece.of(sequences), block.cu_seqlens(piece));
  }
};

/// Steps at an edge of the block, and the product of their transitions.
struct Edge {
  Piece piece;
  at::Tensor product;
};

/// The fewest steps, by doubling, beyond which nothing matters at this edge: the product is zero in
/// each row that has steps beyond. All steps if there are no fewer.
Edge find_edge(const Call& call, const Tensors& sequences,
               const std::function<Piece(std::int64_t)>& at_edge,
               const std::function<std::vector<std::int64_t>(const Piece&)>& rows_beyond) {
  const std::int64_t all = call.block.whole().steps();
  Edge edge{at_edge(0), call.product(at_edge(0), sequences)};
  for (std::int64_t more = kFirstSteps;; more *= 2) {
    const auto rows = rows_beyond(edge.piece);
    if (rows.empty()) return edge;
    const at::Tensor left = call.block.packed()
                                ? edge.product.index_select(
                                      0, at::tensor(rows, edge.product.options().dtype(at::kLong)))
                                : edge.product;
    if (left.eq(0).all().item().toBool()) return edge;
    const Piece longer = at_edge(std::min(all, edge.piece.steps() + more));
    const Piece added = longer.begin < edge.piece.begin ? Piece{longer.begin, edge.piece.begin}
                                                        : Piece{edge.piece.end, longer.end};
    edge = {longer, edge.product * call.product(added, sequences)};
  }
}

Edge last_edge(const Call& call, const Tensors& sequences) {
  return find_edge(
      call, sequences, [&](std::int64_t steps) { return call.block.last(steps); },
      [&](const Piece& piece) { return call.block.leaving_beyond(piece); });
}

/// `last` is known: if it is the whole block, so is the first edge.
Edge first_edge(const Call& call, const Tensors& sequences, const Edge& last) {
  if (!call.block.packed() && last.piece == call.block.whole()) return last;
  return find_edge(
      call, sequences, [&](std::int64_t steps) { return call.block.first(steps); },
      [&](const Piece& piece) { return call.block.entering_beyond(piece); });
}

/// Block by block in the scan's order, from what each rank sent.
const Tensors& of_block(const TensorLists& ranks, const TimeBlock& block, std::int64_t number) {
  return ranks[static_cast<std::size_t>(block.number_of(number))];
}

/// The final state of packed sequences: of each the row of the block that ends it.
at::Tensor gather_ends(const TimeBlock& block, const at::Tensor& final_state) {
  const auto all = Gathering(block.group(), {final_state}).wait();
  Tensors rows;
  std::int64_t n = 0;
  for (const std::int64_t rank : block.ending_ranks()) {
    rows.push_back(all[static_cast<std::size_t>(rank)][0][n++]);
  }
  return rows.empty() ? final_state : at::stack(rows);
}

/// The gradient of the state before this block through the block alone, of `dy` (B, T, ...).
at::Tensor gradient_through(const Call& call, const Piece& first, const at::Tensor& dy,
                            const Tensors& sequences, const at::Tensor& state,
                            const Tensors& saved) {
  if (first.steps() == 0) return at::zeros_like(state);
  if (!call.block.packed()) {
    return call.recurrence->initial_state_gradient(first.of(dy), first.of(sequences));
  }
  if (first == call.block.whole()) {
    const auto cu_seqlens = call.block.cu_seqlens(first);
    return call.recurrence->backward(dy, {}, sequences, state, saved, cu_seqlens).back();
  }
  const auto again = call.forward(first, sequences, state, /*keep=*/true);
  return call.recurrence
      ->backward(first.of(dy), {}, first.of(sequences), state, again.saved,
                 call.block.cu_seqlens(first))
      .back();
}

/// What a block receives from those before it in the scan.
struct Received {
  OptionalTensor state;    // before the block
  at::Tensor final_state;  // of the whole, where blocks are several
  Edge first;              // see gradient_through()
};

Received exchange_states(const Call& call, const Tensors& sequences,
                         const OptionalTensor& initial_state) {
  const TimeBlock& block = call.block;
  if (block.blocks() == 1) return {initial_state, {}, {}};
  const OptionalTensor before = block.first() ? initial_state : OptionalTensor();
  const Edge last = last_edge(call, sequences);
  const at::Tensor after = call.forward(last.piece, sequences, before, /*keep=*/false).final_state;
  Gathering gathering(block.group(), {last.product, after});
  Received received;
  // Found while the summaries travel.
  if (call.needs_gradients) received.first = first_edge(call, sequences, last);

  const auto summaries = gathering.wait();
  received.state = ops::is_given(before) ? *before : at::zeros_like(after);
  at::Tensor carried;
  for (std::int64_t i = 0; i < block.blocks(); ++i) {
    const auto& summary = of_block(summaries, block, i);
    if (i == block.number() && i > 0) received.state = carried;
    carried = i == 0 ? summary[1] : summary[0] * carried + summary[1];
  }
  received.final_state = carried.clone();  // not the buffer of one process's summary
  return received;
}

/// The gradient of the state after this block; `added` is gradient_through() it.
at::Tensor exchange_gradients(const TimeBlock& block, const at::Tensor& product,
                              const at::Tensor& added, const at::Tensor& dfinal) {
  const auto summaries = Gathering(block.group(), {product, added, dfinal}).wait();
  at::Tensor after = at::zeros_like(dfinal);
  for (const auto& summary : summaries) after = after + summary[2];
  for (std::int64_t i = block.blocks() - 1; i > block.number(); --i) {
    const auto& summary = of_block(summaries, block, i);
    after = at::conj(summary[0]) * after + summary[1];
  }
  return after;
}

struct TimeShardedFunction : torch::autograd::Function<TimeShardedFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList sequences,
                               const OptionalTensor& initial_state,
                               const c10::intrusive_ptr<Call>& call) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const TimeBlock& block = call->block;
    const Tensors in = sequences.vec();
    const Received received = exchange_states(*call, in, initial_state);
    const auto outputs =
        call->forward(block.whole(), in, received.state, /*keep=*/call->needs_gradients);
    if (call->needs_gradients) {
      variable_list saved = in;
      saved.insert(saved.end(), {initial_state.value_or(at::Tensor()),
                                 received.state.value_or(at::Tensor()), received.first.product});
      saved.insert(saved.end(), outputs.saved.begin(), outputs.saved.end());
      ctx->save_for_backward(std::move(saved));
      ctx->saved_data["call"] = c10::IValue::make_capsule(call);
      ctx->saved_data["sequences"] = static_cast<std::int64_t>(in.size());
      ctx->saved_data["first_steps"] = received.first.piece.steps();
      ctx->set_materialize_grads(false);
    }
    if (block.blocks() == 1) return {outputs.y, outputs.final_state};
    // The summary of a block is right for the sequence that goes on in the next one alone.
    return {outputs.y,
            block.packed() ? gather_ends(block, outputs.final_state) : received.final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    TORCH_CHECK(!at::GradMode::is_enabled(), call->op,
                ": create_graph must be False in the backward pass, got True: there is no second "
                "derivative over processes");
    const TimeBlock& block = call->block;
    const auto saved = ctx->get_saved_variables();
    const auto rest = saved.begin() + ctx->saved_data["sequences"].toInt();
    const Tensors in(saved.begin(), rest), of_forward(rest + 3, saved.end());
    const at::Tensor &initial = rest[0], &state = rest[1], &product = rest[2];
    const at::Tensor& dy = grads[0];
    at::Tensor after = grads[1];
    if (block.blocks() > 1) {
      const at::Tensor zero = at::zeros_like(state);
      const Piece first = block.first(ctx->saved_data["first_steps"].toInt());
      // Nothing comes before the first block.
      const bool adds = dy.defined() && !block.first();
      const at::Tensor added =
          adds ? gradient_through(*call, first, dy, in, state, of_forward) : zero;
      after = exchange_gradients(block, product, added, after.defined() ? after : zero);
    }
    variable_list gradients = call->recurrence->backward(dy, after, in, state, of_forward,
                                                         block.cu_seqlens(block.whole()));
    if (!initial.defined()) {
      gradients.back() = at::Tensor();
    } else if (!block.first()) {
      gradients.back() = at::zeros_like(initial);
    }
    gradients.emplace_back();
    return gradients;
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> time_sharded(const char* op,
                                                std::unique_ptr<LocalRecurrence> recurrence,
                                                const TimeBlock& block, at::TensorList sequences,
                                                const OptionalTensor& initial_state) {
  bool needs_gradients = ops::any_requires_grad({initial_state.value_or(at::Tensor())});
  for (const auto& t : sequences) needs_gradients |= ops::any_requires_grad({t});
  const auto call = c10::make_intrusive<Call>(op, std::move(recurrence), block, needs_gradients);
  const auto result = TimeShardedFunction::apply(sequences, initial_state, call);
  return {result[0], result[1]};
}

}  // namespace gateloop::distributed
