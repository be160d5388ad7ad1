#include "runtime/state.h"

#include <algorithm>
#include <string>
#include <utility>
#include <variant>

namespace gateloop::runtime {
namespace {

struct MixerSizes {
  const model::ModelSpec& spec;

  LayerSizes operator()(const model::GateLoopSpec& s) const {
    const std::int64_t parts = spec.ablation.state_transition ? 1 : s.transition_parts();
    return {.recurrence = s.state_channels() * parts};
  }
  LayerSizes operator()(const model::AttentionSpec& s) const {
    return {.heads = s.heads, .dim_head = s.dim_head, .window = s.window.value_or(0)};
  }
  LayerSizes operator()(const model::NoMixer&) const { return {}; }
};

std::vector<float> resized_rows(const std::vector<float>& from, std::int64_t rows,
                                std::int64_t kept, std::int64_t width) {
  const std::int64_t before = rows == 0 ? 0 : std::ssize(from) / rows;
  std::vector<float> out(static_cast<std::size_t>(rows * width));
  for (std::int64_t r = 0; r < rows; ++r)
    std::copy_n(from.data() + r * before, kept, out.data() + r * width);
  return out;
}

/// Whether this state may append steps [position, position + time) in place.
bool claims(const std::shared_ptr<StepCache>& cache, std::int64_t position, std::int64_t time,
            bool is_ring) {
  if (cache.use_count() == 1) {
    cache->written = position + time;
    return true;
  }
  // A ring's new steps take the place of those that other states still read.
  std::int64_t before = position;
  return !is_ring && cache->written.compare_exchange_strong(before, position + time);
}

std::int64_t count(const std::vector<float>& numbers) {
  return static_cast<std::int64_t>(numbers.size());
}

}  // namespace

LayerSizes layer_sizes(const model::ModelSpec& spec, const model::LayerSpec& layer) {
  LayerSizes sizes = std::visit(MixerSizes{spec}, layer.mixer);
  if (layer.simple_gate_loop) sizes.simple = spec.dim;
  return sizes;
}

StateData initial_state(const model::ModelSpec& spec, std::uint64_t digest, std::int64_t batch) {
  StateData state{.digest = digest, .batch = batch, .position = 0, .layers = {}};
  for (const model::LayerSpec& layer : spec.layers) {
    const LayerSizes sizes = layer_sizes(spec, layer);
    LayerState& fresh = state.layers.emplace_back();
    fresh.simple.resize(static_cast<std::size_t>(batch * sizes.simple));
    fresh.recurrence.resize(static_cast<std::size_t>(batch * sizes.recurrence));
  }
  return state;
}

std::shared_ptr<StepCache> StepCache::resized(std::int64_t steps, std::int64_t to) const {
  auto made = std::make_shared<StepCache>();
  made->rows = rows;
  made->dim_head = dim_head;
  made->keys = resized_rows(keys, rows, steps * dim_head, to * dim_head);
  made->values = resized_rows(values, rows, steps * dim_head, to * dim_head);
  made->written = steps;
  return made;
}

void reserve_steps(const model::ModelSpec& spec, StateData& state, std::int64_t time) {
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const auto* const attention = std::get_if<model::AttentionSpec>(&spec.layers[i].mixer);
    if (attention == nullptr) continue;
    std::shared_ptr<StepCache>& cache = state.layers[i].steps;
    if (!cache) {
      cache = std::make_shared<StepCache>();
      cache->rows = state.batch * attention->heads;
      cache->dim_head = attention->dim_head;
    }
    const std::int64_t before = cache->capacity();
    const std::int64_t most = attention->window.value_or(INT64_MAX);
    const std::int64_t needed = std::min(most, state.position + time);
    if (needed <= before && claims(cache, state.position, time, attention->window.has_value()))
      continue;
    const std::int64_t capacity =
        needed <= before ? before : std::min(most, std::max(needed, 2 * before));
    // A ring that is not full yet holds its steps in their order, from the first on.
    cache = cache->resized(std::min(before, state.position), capacity);
    cache->written = state.position + time;
  }
}

std::string state_problem(const model::ModelSpec& spec, std::uint64_t digest,
                          const StateData& state) {
  if (state.batch == 0 && state.position == 0 && state.layers.empty()) return "";
  if (state.digest != digest) return "it belongs to another model";
  if (state.batch < 1 || state.position < 0 || state.layers.size() != spec.layers.size())
    return "its sizes are not this model's";
  for (std::size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSizes sizes = layer_sizes(spec, spec.layers[i]);
    const LayerState& layer = state.layers[i];
    const StepCache none, &cache = layer.steps ? *layer.steps : none;
    const std::int64_t kept =
        sizes.window > 0 ? std::min(sizes.window, state.position) : state.position;
    const bool has_steps =
        sizes.heads == 0
            ? !layer.steps
            : kept == 0 || (cache.rows == state.batch * sizes.heads &&
                            cache.dim_head == sizes.dim_head && cache.capacity() >= kept &&
                            (sizes.window == 0 || cache.capacity() <= sizes.window) &&
                            cache.values.size() == cache.keys.size());
    const bool fits = count(layer.simple) == state.batch * sizes.simple &&
                      count(layer.recurrence) == state.batch * sizes.recurrence && has_steps;
    if (!fits) return "layer " + std::to_string(i) + " has other sizes";
  }
  return "";
}

State::State() : data_(std::make_unique<StateData>()) {}
State::State(const State& other) : data_(std::make_unique<StateData>(*other.data_)) {}
State::State(State&& other) noexcept = default;
State& State::operator=(State other) noexcept {
  data_ = std::move(other.data_);
  return *this;
}
State::~State() = default;

std::int64_t State::batch() const { return data_->batch; }
std::int64_t State::position() const { return data_->position; }

std::int64_t State::bytes() const {
  std::int64_t numbers = 0;
  for (const LayerState& layer : data_->layers) {
    numbers += count(layer.simple) + count(layer.recurrence);
    if (layer.steps) numbers += count(layer.steps->keys) + count(layer.steps->values);
  }
  return numbers * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace gateloop::runtime
