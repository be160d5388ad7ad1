// Sequences packed along time against each of them alone, bit for bit.
#include <utility>

#include "harness.h"

namespace gateloop::testing::ragged {
namespace {

using Cuts = std::vector<std::int64_t>;
using recurrence::saved_state_count;
using recurrence::Shape;

/// Which steps of the packed time a call computes, and from which state on.
struct Part {
  std::int64_t begin, end, sequence;
  recurrence::Offsets offsets = {};
};

struct Size {
  DType dtype;
  std::int64_t time, channels, sequences;
  Layout layout = Layout::kContiguous;
  bool states = true;
  Dims dims() const { return {1, time, channels}; }
};

std::int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
    case DType::kComplex64:
      return 8;
    case DType::kComplex128:
      return 16;
  }
  throw std::invalid_argument("no dtype");
}

/// The arguments of one operation and its adjoint on packed sequences.
class Arguments {
 public:
  Arguments(const Size& size, std::uint64_t seed) : size_(size), random_(seed) {}

  Tensor input(std::int64_t parts = 1, double low = -2, double high = 2) {
    Tensor t(size_.dtype, size_.dims(), size_.layout, parts);
    const auto reals = elements(size_.dims()) * static_cast<std::size_t>(parts);
    t.set(random_.uniform(reals * (is_complex(size_.dtype) ? 2 : 1), low, high));
    return t;
  }
  Tensor output(std::int64_t parts = 1) { return {size_.dtype, size_.dims(), size_.layout, parts}; }
  StateTensor state(std::int64_t parts = 1) {
    StateTensor t(size_.dtype, {size_.sequences, 1, size_.channels}, parts);
    const auto reals = static_cast<std::size_t>(size_.sequences * size_.channels * parts);
    t.set(random_.normal(reals * (is_complex(size_.dtype) ? 2 : 1)));
    return t;
  }
  Tensor saved(std::int64_t parts = 1) {
    const std::int64_t rows = saved_state_count(size_.time, size_.sequences);
    return {accumulation(size_.dtype), {1, rows, size_.channels}, Layout::kContiguous, parts};
  }

  recurrence::Sequence from(Tensor& t, const Part& part) const {
    recurrence::Sequence s = t.out();
    s.data = static_cast<std::byte*>(s.data) + part.begin * s.time_stride * bytes_of(size_.dtype);
    return s;
  }
  recurrence::ConstSequence of(Tensor& t, const Part& part) const {
    const auto s = from(t, part);
    return {s.data, s.batch_stride, s.time_stride};
  }
  void* state_of(const Tensor& t, std::int64_t row, std::int64_t parts = 1) const {
    const std::int64_t bytes = bytes_of(accumulation(size_.dtype)) * parts * size_.channels;
    return static_cast<std::byte*>(t.data()) + row * bytes;
  }
  void* optional_state(const Tensor& t, const Part& part, std::int64_t parts = 1) const {
    return size_.states ? state_of(t, part.sequence, parts) : nullptr;
  }
  template <class Params>
  Params params(const Part& part, bool reverse) const {
    Params p;
    p.dtype = size_.dtype;
    p.shape = Shape{1, part.end - part.begin, size_.channels};
    p.reverse = reverse;
    p.offsets = part.offsets;
    return p;
  }

 protected:
  Size size_;

 private:
  Random random_;
};

struct Linear : Arguments {
  static constexpr DType kDTypes[] = {DType::kFloat32,    DType::kFloat64,  DType::kComplex64,
                                      DType::kComplex128, DType::kBFloat16, DType::kFloat16};
  Linear(const Size& size, std::uint64_t seed) : Arguments(size, seed) {}
  // Of complex transitions each part is in [0.5, 0.7]: the modulus is at most 0.99.
  Tensor a = input(1, 0.5, 0.7), x = input(), dh = input(), h = output(), da = output(),
         dx = output();
  StateTensor initial = state(), final_state = state(), dfinal = state(), dinitial = state();

  void run(const Part& part, bool reverse, int threads) {
    auto forward = params<recurrence::LinearRecurrence>(part, reverse);
    forward.a = of(a, part);
    forward.x = of(x, part);
    forward.h = from(h, part);
    forward.initial_state = optional_state(initial, part);
    forward.final_state = optional_state(final_state, part);
    execute(forward, threads);
    auto backward = params<recurrence::LinearRecurrenceBackward>(part, reverse);
    backward.a = of(a, part);
    backward.h = of(h, part);
    backward.dh = of(dh, part);
    backward.da = from(da, part);
    backward.dx = from(dx, part);
    backward.initial_state = optional_state(initial, part);
    backward.dfinal_state = optional_state(dfinal, part);
    backward.dinitial_state = optional_state(dinitial, part);
    execute(backward, threads);
  }
  std::vector<const Tensor*> results() const {
    return {&h, &da, &dx, &final_state, &dinitial, &a, &x, &dh, &initial, &dfinal};
  }
};

struct Polar : Arguments {
  static constexpr auto& kDTypes = kRealDTypes;
  Polar(const Size& size, std::uint64_t seed) : Arguments(size, seed) {}
  Tensor q = input(), k = input(), v = input(), z = input(2, -4, 4), dy = input(), y = output(),
         dq = output(), dk = output(), dv = output(), dz = output(2), saved_states = saved(2);
  StateTensor initial = state(2), final_state = state(2), dfinal = state(2), dinitial = state(2);

  void run(const Part& part, bool reverse, int threads) {
    void* const states = state_of(saved_states, saved_state_count(part.begin, part.sequence), 2);
    auto forward = params<recurrence::PolarGateLoop>(part, reverse);
    forward.q = of(q, part);
    forward.k = of(k, part);
    forward.v = of(v, part);
    forward.z = of(z, part);
    forward.y = from(y, part);
    forward.saved_states = states;
    forward.initial_state = optional_state(initial, part, 2);
    forward.final_state = optional_state(final_state, part, 2);
    execute(forward, threads);
    auto backward = params<recurrence::PolarGateLoopBackward>(part, reverse);
    backward.q = of(q, part);
    backward.k = of(k, part);
    backward.v = of(v, part);
    backward.z = of(z, part);
    backward.dy = of(dy, part);
    backward.saved_states = states;
    backward.dq = from(dq, part);
    backward.dk = from(dk, part);
    backward.dv = from(dv, part);
    backward.dz = from(dz, part);
    backward.dfinal_state = optional_state(dfinal, part, 2);
    backward.dinitial_state = optional_state(dinitial, part, 2);
    execute(backward, threads);
  }
  std::vector<const Tensor*> results() const {
    return {&y, &dq, &dk, &dv, &dz, &saved_states, &final_state, &dinitial, &q, &k, &v, &z, &dy};
  }
};

struct Simple : Arguments {
  static constexpr auto& kDTypes = kRealDTypes;
  Simple(const Size& size, std::uint64_t seed) : Arguments(size, seed) {}
  Tensor q = input(), kv = input(), z = input(1, -4, 4), dy = input(), y = output(), dq = output(),
         dkv = output(), dz = output(), saved_states = saved();
  StateTensor initial = state(), final_state = state(), dfinal = state(), dinitial = state();

  void run(const Part& part, bool reverse, int threads) {
    void* const states = state_of(saved_states, saved_state_count(part.begin, part.sequence));
    auto forward = params<recurrence::SimpleGateLoop>(part, reverse);
    forward.normalize_input = true;
    forward.q = of(q, part);
    forward.kv = of(kv, part);
    forward.z = of(z, part);
    forward.y = from(y, part);
    forward.saved_states = states;
    forward.initial_state = optional_state(initial, part);
    forward.final_state = optional_state(final_state, part);
    execute(forward, threads);
    auto backward = params<recurrence::SimpleGateLoopBackward>(part, reverse);
    backward.normalize_input = true;
    backward.q = of(q, part);
    backward.kv = of(kv, part);
    backward.z = of(z, part);
    backward.dy = of(dy, part);
    backward.saved_states = states;
    backward.dq = from(dq, part);
    backward.dkv = from(dkv, part);
    backward.dz = from(dz, part);
    backward.dfinal_state = optional_state(dfinal, part);
    backward.dinitial_state = optional_state(dinitial, part);
    execute(backward, threads);
  }
  std::vector<const Tensor*> results() const {
    return {&y, &dq, &dkv, &dz, &saved_states, &final_state, &dinitial, &q, &kv, &z, &dy};
  }
};

/// One head of as many keys and values as there are channels, with complex transitions.
struct Wide : Arguments {
  static constexpr auto& kDTypes = kRealDTypes;
  static constexpr int kParts = 2;
  Wide(const Size& size, std::uint64_t seed)
      : Arguments(size, seed),
        width_(size.channels),
        states_(size.channels * size.channels),
        element_(bytes_of(size.dtype)),
        real_(bytes_of(accumulation(size.dtype))),
        a(accumulation(size.dtype), {1, size.time, 1}, Layout::kContiguous, kParts),
        da(accumulation(size.dtype), {1, size.time, 1}, Layout::kContiguous, kParts),
        saved_states(accumulation(size.dtype), {1, rows(size.time, size.sequences), states_},
                     Layout::kContiguous, kParts),
        initial(size.dtype, {size.sequences, 1, states_}, kParts),
        final_state(initial),
        dfinal(initial),
        dinitial(initial) {
    Random random(seed + 1);
    const auto numbers = static_cast<std::size_t>(kParts * size.sequences * states_);
    for (StateTensor* t : {&initial, &dfinal}) t->set(random.normal(numbers));
    // The modulus is at most 0.99.
    a.set(random.uniform(static_cast<std::size_t>(kParts * size.time), 0.5, 0.7));
  }

 private:
  std::int64_t width_, states_, element_, real_;

 public:
  Tensor q = input(), k = input(), v = input(), dy = input(), y = output(), dq = output(),
         dk = output(), dv = output();
  Tensor a, da, saved_states;
  StateTensor initial, final_state, dfinal, dinitial;

  void run(const Part& part, bool reverse, int threads) {
    void* const states = row(saved_states, rows(part.begin, part.sequence));
    recurrence::GateLoop forward;
    set(forward, part, reverse);
    forward.y = heads<recurrence::Heads>(y, part, element_);
    forward.initial_state = state(initial, part);
    forward.final_state = state(final_state, part);
    forward.saved_states = states;
    execute(forward, threads);
    recurrence::GateLoopBackward backward;
    set(backward, part, reverse);
    backward.dy = heads<recurrence::ConstHeads>(dy, part, element_);
    backward.saved_states = states;
    backward.dq = heads<recurrence::Heads>(dq, part, element_);
    backward.dk = heads<recurrence::Heads>(dk, part, element_);
    backward.dv = heads<recurrence::Heads>(dv, part, element_);
    backward.da = heads<recurrence::Heads>(da, part, kParts * real_);
    backward.dfinal_state = state(dfinal, part);
    backward.dinitial_state = state(dinitial, part);
    execute(backward, threads);
  }
  std::vector<const Tensor*> results() const {
    return {&y, &dq, &dk, &dv, &da, &saved_states, &final_state, &dinitial, &q, &k, &v, &dy, &a};
  }

 private:
  static std::int64_t rows(std::int64_t time, std::int64_t sequences) {
    return recurrence::gate_loop_chunks(time, sequences, /*per_key=*/false);
  }
  template <class Params>
  void set(Params& p, const Part& part, bool reverse) {
    p.dtype = size_.dtype;
    p.shape = {1, part.end - part.begin, 1, width_, width_};
    p.reverse = reverse;
    p.offsets = part.offsets;
    p.q = heads<recurrence::ConstHeads>(q, part, element_);
    p.k = heads<recurrence::ConstHeads>(k, part, element_);
    p.v = heads<recurrence::ConstHeads>(v, part, element_);
    p.a = heads<recurrence::ConstHeads>(a, part, kParts * real_);
  }
  /// Of one head; `a` strides over complex numbers.
  template <class Heads>
  Heads heads(Tensor& t, const Part& part, std::int64_t element) {
    const auto s = t.out();
    const std::int64_t stride = &t == &a || &t == &da ? 1 : s.time_stride;
    return {static_cast<std::byte*>(s.data) + part.begin * stride * element, 0, stride, 0};
  }
  void* row(const Tensor& t, std::int64_t index) const {
    return static_cast<std::byte*>(t.data()) + index * kParts * states_ * real_;
  }
  void* state(const Tensor& t, const Part& part) const {
    return size_.states ? row(t, part.sequence) : nullptr;
  }
};

/// Saved states that no sequence uses keep the pattern of fresh memory on both sides.
template <class Op>
void expect_one_by_one(const Cuts& cuts, Size size, bool reverse, std::initializer_list<int> counts,
                       std::uint64_t seed = 3) {
  size.time = cuts.back();
  size.sequences = std::ssize(cuts) - 1;
  const std::string what = describe(size.dtype, size.dims(), reverse, size.layout);
  Op alone(size, seed);
  for (std::int64_t n = 0; n < size.sequences; ++n) {
    const auto at = static_cast<std::size_t>(n);
    alone.run({cuts[at], cuts[at + 1], n}, reverse, 1);
  }
  for (const int count : counts) {
    Op packed(size, seed);
    packed.run({0, size.time, 0, cuts}, reverse, count);
    const auto ours = packed.results(), theirs = alone.results();
    for (std::size_t i = 0; i < ours.size(); ++i) {
      const std::string place = what + " threads " + std::to_string(count) + " result " +
                                std::to_string(i) + " of " + std::to_string(cuts.size() - 1);
      expect_same_bits(ours[i]->get(), theirs[i]->get(), place);
      ours[i]->expect_guards_intact(place.c_str());
    }
  }
}

template <class Op>
class Ragged : public ::testing::Test {};
using Operations = ::testing::Types<Linear, Polar, Simple, Wide>;
TYPED_TEST_SUITE(Ragged, Operations);

// Empty sequences at both ends and in a row; lengths around the block of saved states.
TYPED_TEST(Ragged, EqualsEachSequenceAlone) {
  const Cuts cuts[] = {
      {0},       {0, 0},      {0, 0, 0},          {0, 1},
      {0, 1, 2}, {0, 40, 40}, {0, 0, 5, 5, 5, 9}, {0, 15, 31, 48, 64, 64, 81, 200}};
  for (const DType dtype : TypeParam::kDTypes) {
    for (const Cuts& each : cuts) {
      for (const std::int64_t channels : {0, 1, 8, 19, 64}) {
        for (const bool reverse : {false, true}) {
          expect_one_by_one<TypeParam>(each, {dtype, 0, channels, 0}, reverse, {1, 2, 3});
        }
      }
    }
  }
}

TYPED_TEST(Ragged, AnyLayout) {
  for (const DType dtype : TypeParam::kDTypes) {
    for (const Layout layout : kLayouts) {
      for (const bool reverse : {false, true}) {
        const Cuts cuts = {0, 3, 3, 36, 67};
        expect_one_by_one<TypeParam>(cuts, {dtype, 0, 37, 0, layout}, reverse, {2});
        expect_one_by_one<TypeParam>(cuts, {dtype, 0, 37, 0, layout, false}, reverse, {2});
      }
    }
  }
}

// Large enough for several threads: side by side; one long sequence beside short ones, and fewer
// sequences than threads, one after the other; among them some that are cut in time.
TYPED_TEST(Ragged, SameBitsForAnyThreads) {
  const std::pair<Cuts, std::int64_t> cases[] = {
      {{0, 70, 130, 131, 190, 190, 255, 300}, 70},
      {{0, 1, 300, 301, 302}, 70},
      {{0, 5000, 5000, 9100, 9107}, 2},
  };
  for (const auto& [cuts, channels] : cases) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const bool reverse : {false, true}) {
        expect_one_by_one<TypeParam>(cuts, {dtype, 0, channels, 0}, reverse, {1, 2, 3, 16});
      }
    }
  }
}

// Tiles of one row pass from thread to thread, block by block.
TYPED_TEST(Ragged, SameBitsPipelined) {
  expect_one_by_one<TypeParam>({0, 40, 1640}, {DType::kFloat32, 0, 600, 0}, false, {2});
}

TYPED_TEST(Ragged, RandomCuts) {
  for_drawn_cases(kSanitized ? 10 : 60, [](Random& random, std::uint64_t seed) {
    const auto draw = [&](std::int64_t low, std::int64_t high) {
      return random.integer(low, high);
    };
    Cuts cuts(static_cast<std::size_t>(draw(1, 40)));
    for (std::size_t i = 1; i < cuts.size(); ++i) {
      cuts[i] = cuts[i - 1] + (draw(0, 3) == 0 ? draw(0, 1) : draw(0, 50));
    }
    const Size size{TypeParam::kDTypes[draw(0, std::ssize(TypeParam::kDTypes) - 1)],
                    0,
                    draw(1, 100),
                    0,
                    kLayouts[draw(0, std::ssize(kLayouts) - 1)],
                    draw(0, 1) == 1};
    expect_one_by_one<TypeParam>(cuts, size, draw(0, 1) == 1, {static_cast<int>(draw(1, 4))}, seed);
  });
}

template <class Params>
void expect_refused(const Shape& shape, const Cuts& cuts, const std::string& message) {
  Params p;
  p.shape = shape;
  p.offsets = cuts;
  for (const bool calls_scratch_bytes : {false, true}) {
    try {
      if (calls_scratch_bytes) {
        recurrence::scratch_bytes(p, 2);
      } else {
        recurrence::run(p, {}, nullptr);
      }
      ADD_FAILURE() << "taken: " << message;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  }
}

TEST(RaggedOffsets, AreRefusedWhereTheyDoNotFit) {
  using recurrence::LinearRecurrence, recurrence::PolarGateLoopBackward, recurrence::SimpleGateLoop;
  expect_refused<LinearRecurrence>({1, 5, 3}, {1, 5},
                                   "LinearRecurrence: offsets must begin with 0, got 1");
  expect_refused<PolarGateLoopBackward>(
      {1, 5, 3}, {0, 4}, "PolarGateLoopBackward: offsets must end with the time 5, got 4");
  expect_refused<SimpleGateLoop>({1, 5, 3}, {0, 3, 2, 5},
                                 "SimpleGateLoop: offsets must not decrease, got 2 after 3");
  expect_refused<LinearRecurrence>({2, 5, 3}, {0, 5},
                                   "LinearRecurrence: shape.batch must be 1 beside offsets, got 2");
}

}  // namespace
}  // namespace gateloop::testing::ragged
