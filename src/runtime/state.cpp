#include "runtime/state.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

#include "model/layer_state.h"

namespace gateloop::runtime {
namespace {

/// Whether a state that has read `before` tokens of all sequences may append more in place, up to
/// `after`.
bool claims(const std::shared_ptr<StepCache>& cache, std::int64_t before, std::int64_t after,
            bool is_ring) {
  if (cache.use_count() == 1) {
    cache->written = after;
    return true;
  }
  // A ring's new steps take the place of those that other states still read.
  return !is_ring && cache->written.compare_exchange_strong(before, after);
}

std::int64_t count(const std::vector<float>& numbers) {
  return static_cast<std::int64_t>(numbers.size());
}

/// A sequence of a state.
struct Member {
  const StateData* state;
  std::int64_t sequence;

  std::int64_t position() const { return state->positions[static_cast<std::size_t>(sequence)]; }
};

[[noreturn]] void refuse_to_join() {
  throw std::invalid_argument("State::join: states must be of one model, got two models'");
}

/// One sequence's part of (B, n) numbers, behind those of the others.
void append(std::vector<float>& to, const std::vector<float>& from, const Member& member) {
  const std::int64_t n = count(from) / member.state->batch();
  to.insert(to.end(), from.begin() + member.sequence * n, from.begin() + (member.sequence + 1) * n);
}

std::vector<Member> members_of(const StateData& state) {
  std::vector<Member> members;
  for (std::int64_t b = 0; b < state.batch(); ++b) members.push_back({&state, b});
  return members;
}

/// The keys and values of a layer, zeros behind those of each sequence, with room for the longest
/// and for `capacity` steps; null without attention.
std::shared_ptr<StepCache> gathered_steps(std::span<const Member> members, std::size_t layer,
                                          std::int64_t capacity) {
  const auto steps_of = [&](const Member& member) {
    return member.state->layers[layer].steps.get();
  };
  const auto heads_of = [&](const Member& member) {
    return steps_of(member) == nullptr ? 0 : steps_of(member)->rows / member.state->batch();
  };
  std::shared_ptr<StepCache> made;
  for (const Member& member : members) {
    const StepCache* const from = steps_of(member);
    if (from == nullptr) continue;
    if (!made) {
      made = std::make_shared<StepCache>();
      made->dim_head = from->dim_head;
    }
    if (from->dim_head != made->dim_head) refuse_to_join();
    made->rows += heads_of(member);
    capacity = std::max(capacity, std::min(from->capacity(), member.position()));
  }
  if (!made) return nullptr;
  const std::int64_t width = capacity * made->dim_head;
  made->keys.resize(static_cast<std::size_t>(made->rows * width));
  made->values.resize(made->keys.size());
  std::int64_t to = 0;
  for (const Member& member : members) {
    const StepCache* const from = steps_of(member);
    const std::int64_t heads = heads_of(member);
    for (std::int64_t h = 0; h < heads; ++h, to += width) {
      const std::int64_t n = std::min(from->capacity(), member.position()) * from->dim_head;
      const std::int64_t at = (member.sequence * heads + h) * from->capacity() * from->dim_head;
      std::copy_n(from->keys.data() + at, n, made->keys.data() + to);
      std::copy_n(from->values.data() + at, n, made->values.data() + to);
    }
  }
  return made;
}

/// A state of these sequences, in their order.
StateData gathered(std::span<const Member> members) {
  StateData made;
  if (members.empty()) return made;
  const StateData& like = *members[0].state;
  made.digest = like.digest;
  made.layers.resize(like.layers.size());
  for (const Member& member : members) {
    const StateData& from = *member.state;
    if (from.digest != like.digest || from.layers.size() != like.layers.size()) refuse_to_join();
    made.positions.push_back(member.position());
    for (std::size_t i = 0; i < made.layers.size(); ++i) {
      append(made.layers[i].simple, from.layers[i].simple, member);
      append(made.layers[i].recurrence, from.layers[i].recurrence, member);
    }
  }
  for (std::size_t i = 0; i < made.layers.size(); ++i) {
    made.layers[i].steps = gathered_steps(members, i, 0);
    if (made.layers[i].steps) made.layers[i].steps->written = made.total();
  }
  return made;
}

}  // namespace

std::int64_t StateData::longest() const {
  return positions.empty() ? 0 : *std::max_element(positions.begin(), positions.end());
}
std::int64_t StateData::total() const {
  return std::accumulate(positions.begin(), positions.end(), std::int64_t{0});
}

std::int64_t StateData::bytes() const {
  std::int64_t numbers = 0;
  for (const LayerState& layer : layers) {
    numbers += count(layer.simple) + count(layer.recurrence);
    if (layer.steps) numbers += count(layer.steps->keys) + count(layer.steps->values);
  }
  return numbers * static_cast<std::int64_t>(sizeof(float));
}

StateData initial_state(const model::ModelSpec& spec, std::uint64_t digest, std::int64_t batch) {
  StateData state{.digest = digest, .positions = {}, .layers = {}};
  state.positions.resize(static_cast<std::size_t>(batch));
  for (const model::LayerSpec& layer : spec.layers) {
    const model::LayerStateSizes sizes = model::layer_state_sizes(spec, layer);
    LayerState& fresh = state.layers.emplace_back();
    fresh.simple.resize(static_cast<std::size_t>(batch * sizes.simple));
    fresh.recurrence.resize(static_cast<std::size_t>(batch * sizes.recurrence));
  }
  return state;
}

void reserve_steps(const model::ModelSpec& spec, StateData& state, const Runs& runs) {
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < state.batch(); ++b)
    longest = std::max(longest, state.positions[static_cast<std::size_t>(b)] + runs.steps(b));
  const std::int64_t before_all = state.total(), after_all = before_all + runs.rows();
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const auto* const attention = std::get_if<model::AttentionSpec>(&spec.layers[i].mixer);
    if (attention == nullptr) continue;
    std::shared_ptr<StepCache>& cache = state.layers[i].steps;
    if (!cache) {
      cache = std::make_shared<StepCache>();
      cache->rows = state.batch() * attention->heads;
      cache->dim_head = attention->dim_head;
    }
    const std::int64_t before = cache->capacity();
    const std::int64_t most = attention->window.value_or(INT64_MAX);
    const std::int64_t needed = std::min(most, longest);
    if (needed <= before && claims(cache, before_all, after_all, attention->window.has_value()))
      continue;
    const std::int64_t capacity =
        needed <= before ? before : std::min(most, std::max(needed, 2 * before));
    // A ring that is not full yet holds its steps in their order, from the first on.
    cache = gathered_steps(members_of(state), i, capacity);
    cache->written = after_all;
  }
}

StateData compact(const StateData& state) { return gathered(members_of(state)); }

std::string state_problem(const model::ModelSpec& spec, std::uint64_t digest,
                          const StateData& state) {
  if (state.batch() == 0 && state.layers.empty()) return "";
  if (state.digest != digest) return "it belongs to another model";
  const bool starts_late = std::any_of(state.positions.begin(), state.positions.end(),
                                       [](std::int64_t position) { return position < 0; });
  if (state.batch() < 1 || starts_late || state.layers.size() != spec.layers.size())
    return "its sizes are not this model's";
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const model::LayerStateSizes sizes = model::layer_state_sizes(spec, spec.layers[i]);
    const LayerState& layer = state.layers[i];
    const StepCache* const cache = layer.steps.get();
    const std::int64_t kept =
        sizes.window > 0 ? std::min(sizes.window, state.longest()) : state.longest();
    const bool has_steps =
        cache == nullptr ? sizes.heads == 0 || kept == 0
                         : sizes.heads > 0 && cache->rows == state.batch() * sizes.heads &&
                               cache->dim_head == sizes.dim_head && cache->capacity() >= kept &&
                               (sizes.window == 0 || cache->capacity() <= sizes.window) &&
                               cache->values.size() == cache->keys.size();
    const bool fits = count(layer.simple) == state.batch() * sizes.simple &&
                      count(layer.recurrence) == state.batch() * sizes.recurrence && has_steps;
    if (!fits) return "layer " + std::to_string(i) + " has other sizes";
  }
  return "";
}

State::State() : data_(std::make_unique<StateData>()) {}
State::State(const State& other) : data_(std::make_unique<StateData>(other.data())) {}
State::State(State&& other) noexcept = default;
State& State::operator=(State other) noexcept {
  data_ = std::move(other.data_);
  return *this;
}
State::~State() = default;

const StateData& State::data() const {
  static const StateData empty;  // of a state that was moved from
  return data_ ? *data_ : empty;
}
std::int64_t State::batch() const { return data().batch(); }
std::int64_t State::position() const { return data().longest(); }
std::vector<std::int64_t> State::positions() const { return data().positions; }
std::int64_t State::bytes() const { return data().bytes(); }

State State::select(std::span<const std::int64_t> sequences) const {
  if (sequences.empty())
    throw std::invalid_argument("State::select: sequences must be one at least, got none");
  std::vector<Member> members;
  for (const std::int64_t sequence : sequences) {
    if (sequence < 0 || sequence >= batch())
      throw std::invalid_argument("State::select: sequences must be in [0, " +
                                  std::to_string(batch()) + "), got " + std::to_string(sequence));
    members.push_back({&data(), sequence});
  }
  State made;
  *made.data_ = gathered(members);
  return made;
}

State State::join(std::span<const State> states) {
  if (states.empty())
    throw std::invalid_argument("State::join: states must be one at least, got none");
  std::vector<Member> members;
  for (const State& state : states) {
    if (state.batch() == 0)
      throw std::invalid_argument("State::join: states must have read tokens, got one with none");
    const auto all = members_of(state.data());
    members.insert(members.end(), all.begin(), all.end());
  }
  State made;
  *made.data_ = gathered(members);
  return made;
}

}  // namespace gateloop::runtime
