#include "ops/composite/blocked_scan.h"

#include <algorithm>

#include "ops/composite/index.h"

namespace gateloop::ops {
namespace {

/// Steps of a block. All blocks take a step in three launches; sums of blocks are a sixteenth of
/// the sequence. At (1, 16,384, 512) and (8, 1,024, 512), float32 and complex64, on 2 cores: 16
/// takes 17, 34, 8 and 20 ms; 8 takes 23, 42, 9 and 25 ms; 32 takes 16, 30, 8 and 14 ms in twice
/// the launches.
constexpr std::int64_t kBlock = 16;

/// Steps at which a recurrence begins anew, ascending, and the states after them, (steps, D).
struct Starts {
  std::vector<std::int64_t> steps;
  at::Tensor states;
};

/// Those of one step of all blocks: which blocks, (n), and the states, (n, D).
struct StartsOfStep {
  at::Tensor blocks, states;
};

/// `time` steps from `first` on in blocks of `length`: what begins at each step of a block.
std::vector<StartsOfStep> by_step(const Starts& starts, std::int64_t first, std::int64_t time,
                                  std::int64_t length) {
  std::vector<StartsOfStep> result;
  if (starts.steps.empty()) return result;
  const auto from = std::lower_bound(starts.steps.begin(), starts.steps.end(), first);
  const auto end = std::lower_bound(from, starts.steps.end(), first + time);
  if (from == end) return result;
  std::vector<std::vector<std::int64_t>> blocks(static_cast<std::size_t>(length)), rows = blocks;
  for (auto at = from; at != end; ++at) {
    const auto step = static_cast<std::size_t>((*at - first) % length);
    blocks[step].push_back((*at - first) / length);
    rows[step].push_back(at - starts.steps.begin());
  }
  // All in one tensor: on another device it is one copy.
  std::vector<std::int64_t> numbers;
  for (const auto* const lists : {&blocks, &rows}) {
    for (const auto& list : *lists) numbers.insert(numbers.end(), list.begin(), list.end());
  }
  const at::Tensor index = index_for(starts.states, numbers);
  const at::Tensor states = starts.states.index_select(0, index.narrow(0, end - from, end - from));
  std::int64_t at = 0;
  for (const auto& list : blocks) {
    const std::int64_t count = std::ssize(list);
    result.push_back({index.narrow(0, at, count), states.narrow(0, at, count)});
    at += count;
  }
  return result;
}

bool has_any(const std::vector<StartsOfStep>& starts, std::int64_t step) {
  return !starts.empty() && starts[static_cast<std::size_t>(step)].blocks.size(0) > 0;
}

/// Puts the states into those blocks of `all`, (B, blocks, D) or, of one block, (B, D).
void begin_anew(const StartsOfStep& starts, const at::Tensor& all) {
  const at::Tensor& states = starts.states;
  all.index_copy_(-2, starts.blocks, all.dim() == 3 ? states.unsqueeze(0) : states);
}

/// Runs the last dimension but one of a, x and h, (..., L, D), from `state` (..., D).
at::Tensor steps(const at::Tensor& a, const at::Tensor& x, at::Tensor state, bool reverse,
                 const at::Tensor& h, const std::vector<StartsOfStep>& starts) {
  const std::int64_t count = a.size(-2);
  const bool in_place = h.scalar_type() == state.scalar_type();
  if (!in_place) state = state.clone();
  for (std::int64_t s = 0; s < count; ++s) {
    const std::int64_t t = reverse ? count - 1 - s : s;
    at::Tensor out = h.select(-2, t), next = in_place ? out : state;
    at::addcmul_out(next, x.select(-2, t), a.select(-2, t), state);
    if (has_any(starts, t)) begin_anew(starts[static_cast<std::size_t>(t)], next);
    if (!in_place) out.copy_(next);
    state = next;
  }
  return state;
}

struct AffineMap {
  at::Tensor a, x;  // h -> a h + x
};

/// All L steps of (..., L, D) as one, (..., D) in `dtype`.
AffineMap joined(const at::Tensor& a, const at::Tensor& x, bool reverse, at::ScalarType dtype,
                 const std::vector<StartsOfStep>& starts) {
  const std::int64_t count = a.size(-2);
  const std::int64_t first = reverse ? count - 1 : 0;
  const auto copy = [&](const at::Tensor& t) {
    return t.select(-2, first).to(dtype, /*non_blocking=*/false, /*copy=*/true,
                                  at::MemoryFormat::Contiguous);
  };
  AffineMap all{copy(a), copy(x)};
  const auto begin = [&](std::int64_t t) {
    if (!has_any(starts, t)) return;
    const StartsOfStep& here = starts[static_cast<std::size_t>(t)];
    begin_anew(here, all.x);
    all.a.index_fill_(-2, here.blocks, 0);
  };
  begin(first);
  for (std::int64_t s = 1; s < count; ++s) {
    const std::int64_t t = reverse ? count - 1 - s : s;
    const at::Tensor factor = a.select(-2, t);
    at::addcmul_out(all.x, x.select(-2, t), factor, all.x);
    all.a.mul_(factor);
    begin(t);
  }
  return all;
}

/// The blocks that have a start as steps of their own: `ends` (1, blocks, D) are the states after.
Starts of_blocks(const Starts& starts, std::int64_t first, std::int64_t time,
                 const at::Tensor& ends) {
  Starts result;
  for (const std::int64_t step : starts.steps) {
    if (step < first || step >= first + time) continue;
    const std::int64_t block = (step - first) / kBlock;
    if (result.steps.empty() || result.steps.back() != block) result.steps.push_back(block);
  }
  if (result.steps.empty()) return result;
  result.states = ends.index_select(1, index_for(ends, result.steps)).squeeze(0);
  return result;
}

at::Tensor scan(const at::Tensor& a, const at::Tensor& x, const at::Tensor& initial_state,
                bool reverse, const at::Tensor& h, const Starts& starts) {
  const std::int64_t time = a.size(1), blocks = time / kBlock, rest = time % kBlock;
  if (blocks < 2) {
    return steps(a, x, initial_state, reverse, h, by_step(starts, 0, time, time)).clone();
  }
  // In scan order the blocks come first, then what is left over.
  const std::int64_t whole = time - rest, first = reverse ? rest : 0, left = reverse ? 0 : whole;
  const auto in_blocks = [&](const at::Tensor& t) {
    return t.narrow(1, first, whole).unflatten(1, {blocks, kBlock});
  };
  const auto left_over = [&](const at::Tensor& t) { return t.narrow(1, left, rest); };
  const auto inside = by_step(starts, first, whole, kBlock);
  const AffineMap each =
      joined(in_blocks(a), in_blocks(x), reverse, initial_state.scalar_type(), inside);
  const at::Tensor& ends = each.x;  // becomes the states after the blocks, (B, blocks, D)
  scan(each.a, each.x, initial_state, reverse, ends, of_blocks(starts, first, whole, ends));
  const at::Tensor from = initial_state.unsqueeze(1);
  const at::Tensor before = reverse ? at::cat({ends.narrow(1, 1, blocks - 1), from}, 1)
                                    : at::cat({from, ends.narrow(1, 0, blocks - 1)}, 1);
  const at::Tensor last = steps(in_blocks(a), in_blocks(x), before, reverse, in_blocks(h), inside)
                              .select(1, reverse ? 0 : blocks - 1);
  return steps(left_over(a), left_over(x), last, reverse, left_over(h),
               by_step(starts, left, rest, rest))
      .clone();
}

}  // namespace

at::Tensor blocked_scan(const at::Tensor& a, const at::Tensor& x, const at::Tensor& initial_state,
                        bool reverse, const at::Tensor& h) {
  return scan(a, x, initial_state, reverse, h, {});
}

at::Tensor packed_scan(const at::Tensor& a, const at::Tensor& x, const at::Tensor& initial_states,
                       const std::vector<std::int64_t>& offsets, bool reverse,
                       const at::Tensor& h) {
  const auto type = initial_states.scalar_type();
  std::vector<std::int64_t> rows, starts, ends;  // of sequences that are not empty
  for (std::int64_t n = 0; n + 1 < std::ssize(offsets); ++n) {
    const auto at = static_cast<std::size_t>(n);
    const std::int64_t first = offsets[at], last = offsets[at + 1] - 1;
    if (last < first) continue;
    rows.push_back(n);
    starts.push_back(reverse ? last : first);
    ends.push_back(reverse ? first : last);
  }
  if (rows.empty()) return initial_states.clone();
  const at::Tensor begin = index_for(h, starts), sequences = index_for(h, rows);
  const auto at_begin = [&](const at::Tensor& t) { return t.index_select(1, begin).squeeze(0); };
  const at::Tensor begun =
      at::addcmul(at_begin(x), at_begin(a), initial_states.index_select(0, sequences));
  const at::Tensor wide =
      h.scalar_type() == type ? h : at::empty(h.sizes(), h.options().dtype(type));
  // Every state before a first step is replaced after it: any will do.
  scan(a, x, initial_states.narrow(0, 0, 1), reverse, wide, {std::move(starts), begun});
  if (!wide.is_same(h)) h.copy_(wide);
  return initial_states.index_copy(0, sequences,
                                   wide.index_select(1, index_for(h, ends)).squeeze(0));
}

}  // namespace gateloop::ops
