#include "ops/composite/definition.h"

#include <algorithm>

#include "ops/autograd/gradients.h"
#include "ops/composite/index.h"
#include "ops/offsets.h"

namespace gateloop::ops {
namespace {

/// Numbers of a span. Forward and backward at (1, 16,384, 512) on 2 cores, for 2^18, 2^20 and 2^22:
/// polar gate 800, 778 and 1,206 ms, simple gate 131, 108 and 119 ms. At 4,096 steps 8 heads of 64
/// keys and values take 701, 505 and 448 ms. Memory grows with it, launches shrink.
constexpr std::int64_t kSpanNumbers = std::int64_t{1} << 20;

/// Longer than any sequence.
constexpr std::int64_t kWhole = std::int64_t{1} << 62;

/// Steps that are computed together: of the batch, of one packed sequence, or several of these.
struct Span {
  std::int64_t row = 0, rows = 0;     // of states of sequences
  std::int64_t begin = 0, steps = 0;  // in time
  std::int64_t block = 0;             // the first of its saved states
  std::vector<std::int64_t> offsets;  // of several sequences, from `begin` on

  OptionalTensor cu_seqlens() const {
    return offsets.empty() ? OptionalTensor() : host_index(offsets);
  }
};

std::int64_t count_blocks(std::int64_t steps, std::int64_t block) {
  return (steps + block - 1) / block;
}

/// The saved states (1, blocks, ...) of several sequences lie apart (saved_state_count()).
struct SavedPlaces {
  std::vector<std::int64_t> first;  // of each sequence, also of one that is empty
  std::vector<std::int64_t> all;    // one sequence behind another

  SavedPlaces(const Span& span, std::int64_t block) {
    for (std::int64_t n = 0; n < span.rows; ++n) {
      const auto at = static_cast<std::size_t>(n);
      const std::int64_t begin = span.offsets[at], steps = span.offsets[at + 1] - begin;
      first.push_back((span.begin + begin) / block + span.row + n);
      for (std::int64_t b = 0; b < count_blocks(steps, block); ++b) all.push_back(first[at] + b);
    }
  }
};

at::Tensor time_of(const Span& span, const at::Tensor& t) {
  return t.narrow(1, span.begin, span.steps);
}
at::Tensor rows_of(const Span& span, const at::Tensor& t) {
  return t.narrow(0, span.row, span.rows);
}
std::vector<at::Tensor> time_of(const Span& span, const std::vector<at::Tensor>& all) {
  std::vector<at::Tensor> parts;
  parts.reserve(all.size());
  for (const auto& t : all) parts.push_back(time_of(span, t));
  return parts;
}

/// In scan order, one of no steps for an empty sequence. Short packed sequences share a span.
std::vector<Span> spans_of(const char* op, const Definition& definition, const at::Tensor& sequence,
                           const OptionalTensor& cu_seqlens, std::int64_t longest) {
  const std::int64_t batch = sequence.size(0), time = sequence.size(1), block = definition.block;
  auto offsets = sequence_offsets(op, cu_seqlens, time);
  const bool packed = !offsets.empty();
  if (!packed) offsets = {0, time};
  std::vector<Span> spans;
  // In whole blocks, which wide heads fill up, and one of an empty sequence, which has a state too.
  const auto taken = [&](std::size_t at) {
    const std::int64_t steps = offsets[at + 1] - offsets[at];
    return std::max<std::int64_t>(count_blocks(steps, block), 1) * block;
  };
  for (std::int64_t n = 0; n + 1 < std::ssize(offsets);) {
    const auto at = static_cast<std::size_t>(n);
    const std::int64_t first = offsets[at], end = offsets[at + 1];
    const std::int64_t saved = packed ? first / block + n : 0;
    std::size_t next = at + 1;
    if (packed && definition.takes_packed) {
      std::int64_t together = taken(at);
      while (next + 1 < offsets.size() && together + taken(next) <= longest) {
        together += taken(next++);
      }
    }
    n = static_cast<std::int64_t>(next);
    if (next > at + 1) {
      Span span{.row = static_cast<std::int64_t>(at),
                .rows = static_cast<std::int64_t>(next - at),
                .begin = first,
                .steps = offsets[next] - first,
                .block = saved,
                .offsets = {}};
      for (std::size_t i = at; i <= next; ++i) span.offsets.push_back(offsets[i] - first);
      spans.push_back(std::move(span));
      continue;
    }
    for (std::int64_t s = 0; s == 0 || s < end - first; s += longest) {
      const std::int64_t steps = std::min(longest, end - first - s);
      spans.push_back({.row = packed ? static_cast<std::int64_t>(at) : 0,
                       .rows = packed ? 1 : batch,
                       .begin = definition.reverse ? end - s - steps : first + s,
                       .steps = steps,
                       .block = saved + s / block,
                       .offsets = {}});
    }
  }
  return spans;
}

std::int64_t span_steps(const Definition& definition, const at::Tensor& sequence) {
  const std::int64_t of_step = std::max<std::int64_t>(sequence.size(0) * definition.width, 1);
  const std::int64_t blocks = kSpanNumbers / of_step / definition.block;
  return std::max<std::int64_t>(blocks, 1) * definition.block;
}

at::Tensor initial_of(const Definition& definition, const at::Tensor& sequence,
                      const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  if (is_given(initial_state)) return *initial_state;
  std::vector<std::int64_t> sizes = definition.sizes;
  sizes.insert(sizes.begin(), is_given(cu_seqlens) ? cu_seqlens->size(0) - 1 : sequence.size(0));
  return at::zeros(sizes, sequence.options().dtype(definition.dtype));
}

/// Has autograd record although its kernels have been passed already. Derivatives of complex
/// numbers are conjugates, which a dispatch key behind autograd's resolves. Under a Python dispatch
/// mode (FlopCounterMode, selective checkpointing) that key is excluded here too.
class Recording {
 public:
  Recording() : Recording(c10::impl::tls_local_dispatch_key_set()) {}

 private:
  explicit Recording(const c10::impl::LocalDispatchKeySet& now)
      : guard_(now.included_,
               now.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView - kLazy) {}

  static constexpr c10::DispatchKeySet kLazy{
      c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor};

  c10::impl::ForceDispatchKeyGuard guard_;
};

/// Of the sequences and the state of one span.
std::vector<at::Tensor> gradients_of(const Definition& definition, std::vector<at::Tensor> inputs,
                                     const OptionalTensor& cu_seqlens, const at::Tensor& dy,
                                     const at::Tensor& dfinal_state) {
  const Recording recording;
  for (at::Tensor& input : inputs) input = input.detach().requires_grad_();
  const auto compute = [&](const std::vector<at::Tensor>& in) {
    const auto results = definition.compute({in.begin(), in.end() - 1}, in.back(), cu_seqlens);
    return std::vector<at::Tensor>{results.y, results.final_state};
  };
  return differentiate(compute, inputs, {dy, dfinal_state});
}

/// Into those of a call.
void save_states(const Definition& definition, const Span& span, const at::Tensor& states,
                 const at::Tensor& saved) {
  if (span.offsets.empty()) {
    saved.narrow(1, span.block, count_blocks(span.steps, definition.block)).copy_(states);
  } else {
    saved.index_copy_(1, index_for(saved, SavedPlaces(span, definition.block).all), states);
  }
}

/// The states that a span begins with, of those that save_states() wrote.
at::Tensor saved_initial(const Definition& definition, const Span& span, const at::Tensor& saved) {
  if (span.offsets.empty()) return saved.select(1, span.block);
  const auto places = index_for(saved, SavedPlaces(span, definition.block).first);
  return saved.index_select(1, places).squeeze(0);
}

}  // namespace

std::vector<at::Tensor> compute_whole(const Definition& definition,
                                      const std::vector<at::Tensor>& sequences,
                                      const OptionalTensor& initial_state,
                                      const OptionalTensor& cu_seqlens) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor& first = sequences[0];
  const at::Tensor initial = initial_of(definition, first, initial_state, cu_seqlens);
  std::vector<at::Tensor> ys = {sequences[definition.like].narrow(1, 0, 0)};
  std::vector<at::Tensor> states = {initial.narrow(0, 0, 0)};
  for (const Span& span : spans_of(definition.op, definition, first, cu_seqlens, kWhole)) {
    const at::Tensor state = rows_of(span, initial);
    if (span.steps == 0) {
      states.push_back(state);
      continue;
    }
    const auto results = definition.compute(time_of(span, sequences), state, span.cu_seqlens());
    ys.push_back(results.y);
    states.push_back(results.final_state);
  }
  return {at::cat(ys, 1), at::cat(states, 0)};
}

void compute_in_spans(const Definition& definition, const std::vector<at::Tensor>& sequences,
                      const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                      const Definition::Results& outputs) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  const at::Tensor& first = sequences[0];
  outputs.final_state.copy_(initial_of(definition, first, initial_state, cu_seqlens));
  const auto steps = span_steps(definition, first);
  for (const Span& span : spans_of(definition.op, definition, first, cu_seqlens, steps)) {
    if (span.steps == 0) continue;
    const at::Tensor state = rows_of(span, outputs.final_state);
    const auto results = definition.compute(time_of(span, sequences), state, span.cu_seqlens());
    time_of(span, outputs.y).copy_(results.y);
    if (outputs.states.defined()) {
      save_states(definition, span, results.states, outputs.states);
    }
    state.copy_(results.final_state);
  }
}

void differentiate_in_spans(const char* op, const Definition& definition,
                            const std::vector<at::Tensor>& sequences, const at::Tensor& states,
                            const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                            const OptionalTensor& cu_seqlens,
                            const std::vector<at::Tensor>& gradients) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoGradMode once(false);
  const at::Tensor &first = sequences[0], &dstates = gradients.back();
  dstates.zero_();
  if (is_given(dfinal_state)) dstates.copy_(*dfinal_state);
  auto spans = spans_of(op, definition, first, cu_seqlens, span_steps(definition, first));
  std::reverse(spans.begin(), spans.end());
  for (const Span& span : spans) {
    if (span.steps == 0) continue;
    std::vector<at::Tensor> inputs = time_of(span, sequences);
    inputs.push_back(saved_initial(definition, span, states));
    const at::Tensor dstate = rows_of(span, dstates);
    const auto found = gradients_of(definition, std::move(inputs), span.cu_seqlens(),
                                    is_given(dy) ? time_of(span, *dy) : at::Tensor(), dstate);
    for (std::size_t i = 0; i < found.size(); ++i) {
      const at::Tensor gradient = i < sequences.size() ? time_of(span, gradients[i]) : dstate;
      // Without dy nothing flows to what only y reads.
      found[i].defined() ? gradient.copy_(found[i]) : gradient.zero_();
    }
  }
}

at::Tensor states_before_blocks(const at::Tensor& h, const at::Tensor& initial_state,
                                std::int64_t block, bool reverse,
                                const OptionalTensor& cu_seqlens) {
  const auto offsets = sequence_offsets("gateloop::states_before_blocks", cu_seqlens, h.size(1));
  if (!offsets.empty()) {
    // Rows of the initial states and, behind them, of the steps before later blocks.
    std::vector<std::int64_t> ends, order;
    const std::int64_t sequences = std::ssize(offsets) - 1;
    for (std::int64_t n = 0; n < sequences; ++n) {
      const auto at = static_cast<std::size_t>(n);
      const std::int64_t begin = offsets[at], end = offsets[at + 1];
      if (begin < end) order.push_back(n);
      for (std::int64_t s = block; s < end - begin; s += block) {
        order.push_back(sequences + std::ssize(ends));
        ends.push_back(reverse ? end - s : begin + s - 1);
      }
    }
    return at::cat({initial_state.unsqueeze(0), h.index_select(1, index_for(h, ends))}, 1)
        .index_select(1, index_for(h, order));
  }
  const std::int64_t time = h.size(1), kept = (time - 1) / block;
  const at::Tensor ends = reverse ? h.slice(1, time - block * kept, time - block + 1, block).flip(1)
                                  : h.slice(1, block - 1, time - 1, block);
  return at::cat({initial_state.unsqueeze(1), ends}, 1);
}

}  // namespace gateloop::ops
