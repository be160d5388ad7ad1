#pragma once

/// From the plain structs to what a launch takes: views, schedule, scratch. Runs on the host.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/dtypes.h"
#include "recurrence/cuda/schedule-inl.h"

namespace gateloop::recurrence::cuda {

/// `element`: reals that one element of the strides counts. Returns whether it is given and read in
/// whole accesses.
template <class S, int kParts, int kChannels, class AnySequence>
bool bind(View<S, kParts, kChannels>& view, const AnySequence& sequence, std::int64_t element,
          bool reverse) {
  constexpr std::uintptr_t kBytes = sizeof(S) * kParts * kChannels;
  constexpr std::int64_t kReals = kParts * kChannels;
  view.data = static_cast<S*>(sequence.data);
  view.batch_stride = sequence.batch_stride * element;
  view.time_stride = sequence.time_stride * element;
  view.step_stride = reverse ? -view.time_stride : view.time_stride;
  view.wide = reinterpret_cast<std::uintptr_t>(view.data) % kBytes == 0 &&
              view.batch_stride % kReals == 0 && view.time_stride % kReals == 0;
  const std::int64_t step_bytes = view.step_stride * static_cast<std::int64_t>(sizeof(S));
  view.step_bytes = static_cast<std::int32_t>(step_bytes);
  return view.wide && !view.is_null() && view.step_bytes == step_bytes;
}
/// (rows, D), contiguous.
template <class S, int kParts, int kChannels, class Pointer>
void bind_state(View<S, kParts, kChannels>& view, Pointer data, const Shape& shape) {
  struct {
    Pointer data;
    std::int64_t batch_stride, time_stride;
  } const rows{data, shape.channels, 0};
  bind(view, rows, kParts, /*reverse=*/false);
}

/// Bytes of scratch, from its start on: `cleared` of them hold the ticket and the flags and are
/// zero before a launch, the others the carries.
struct ScanScratch {
  std::size_t cleared = 0, total = 0;
};

constexpr std::size_t kScratchAlignment = 256;
inline std::size_t round_up(std::size_t n) {
  return (n + kScratchAlignment - 1) / kScratchAlignment * kScratchAlignment;
}

/// Checks what can be checked without reading offsets, which lie on the device.
template <class Params>
void check(const char* name, const Params& p, bool complex_allowed) {
  cpu::check(name, p.shape, p.dtype, complex_allowed);
  if (!p.offsets.empty() && p.shape.batch != 1) {
    throw std::invalid_argument(std::string(name) + ": shape.batch must be 1 beside offsets, got " +
                                std::to_string(p.shape.batch));
  }
}

template <class Tile, class Params>
Schedule schedule_of(const Params& p) {
  Schedule s;
  s.channels = p.shape.channels;
  s.time = p.shape.time;
  s.reverse = p.reverse;
  s.tiles = div_up(s.channels, Tile::kWidth);
  s.rows = static_cast<int>(std::clamp<std::int64_t>(div_up(s.time, Tile::kSteps), 1, Tile::kRows));
  if (p.offsets.empty()) {
    s.sequences = p.shape.batch;
    s.slots = s.sequences * chunks_of(s.time, Tile::kChunk);
  } else {
    s.sequences = static_cast<std::int64_t>(p.offsets.size()) - 1;
    s.offsets = p.offsets.data();
    s.slots = s.sequences == 0 ? 0 : s.time / Tile::kChunk + s.sequences;
  }
  return s;
}

/// None where every sequence is one chunk.
template <class Value, class Tile>
ScanScratch scratch_of(const Schedule& s) {
  if (s.time <= Tile::kChunk) return {};
  const auto places = static_cast<std::size_t>(s.slots * s.tiles);
  const std::size_t cleared = round_up(round_up(sizeof(unsigned)) + places * sizeof(unsigned));
  return {cleared, cleared + places * Tile::kWidth * 3 * sizeof(Value)};
}

// ---------------------------------------------------------------- the kernel of a dtype

/// Calls f.operator()<Tile>(op) with the Op of this storage and the tile that `launch` gives it.
template <template <class, class, int> class Op, auto launch, class S,
          template <class> class Number, class Params, class F>
void visit_as(const Params& p, const F& f) {
  using Value = Number<Accumulation<S>>;
  constexpr Launch kLaunch = launch(sizeof(S), sizeof(Value));
  f.template operator()<Tile<kLaunch>>(Op<S, Value, kLaunch.channels>(p));
}

/// Sequences of reals, states of Number.
template <template <class, class, int> class Op, auto launch, template <class> class Number,
          class Params, class F>
void visit_real(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::kFloat32:
      return visit_as<Op, launch, float, Number>(p, f);
    case DType::kFloat64:
      return visit_as<Op, launch, double, Number>(p, f);
    case DType::kBFloat16:
      return visit_as<Op, launch, BFloat16, Number>(p, f);
    case DType::kFloat16:
      return visit_as<Op, launch, Float16, Number>(p, f);
    case DType::kComplex64:
    case DType::kComplex128:
      break;
  }
  cpu::throw_dtype(p.dtype);
}

/// One step of one sequence a batch entry.
template <class Params>
bool is_step(const Params& p) {
  return p.offsets.empty() && p.shape.time == 1;
}

inline void set_scratch(Schedule& s, const ScanScratch& sizes, void* scratch) {
  if (sizes.total == 0) return;
  auto* const bytes = static_cast<std::byte*>(scratch);
  s.ticket = reinterpret_cast<unsigned*>(bytes);
  s.flags = reinterpret_cast<unsigned*>(bytes + round_up(sizeof(unsigned)));
  s.carries = bytes + sizes.cleared;
}

}  // namespace gateloop::recurrence::cuda
