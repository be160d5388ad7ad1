// Every recurrence and RMSNorm against the oracle on cases drawn from a seed.
#include "gate_loop_case.h"
#include "linear_recurrence_case.h"
#include "polar_gate_loop_case.h"
#include "recurrence/cpu/constants.h"
#include "recurrence/cpu/target.h"
#include "rms_norm_case.h"
#include "simple_gate_loop_case.h"

namespace gateloop::testing {
namespace {

class Draw {
 public:
  explicit Draw(Random& random) : random_(random) {}

  std::int64_t integer(std::int64_t low, std::int64_t high) { return random_.integer(low, high); }
  bool flag() { return integer(0, 1) == 1; }
  template <class T, std::size_t n>
  T one_of(const T (&values)[n]) {
    return values[integer(0, n - 1)];
  }

  /// Narrow and long, wide and short, or many and tiny; each size may be zero or one.
  Dims dims() {
    constexpr Dims kLargest[] = {{2, 5000, 3}, {2, 300, 70}, {4, 40, 300}, {50, 5, 20}};
    const Dims most = one_of(kLargest);
    const auto size = [&](std::int64_t high) {
      return integer(0, 9) == 0 ? integer(0, 1) : integer(1, high);
    };
    return {size(most.batch), size(most.time), size(most.channels)};
  }

  template <class Case>
  Case a_case(std::uint64_t seed) {
    Case c{};
    c.dims = dims();
    c.reverse = flag();
    c.layout = one_of(kLayouts);
    c.states = flag();
    c.threads = static_cast<int>(integer(1, 4));
    c.seed = seed;
    return c;
  }

  /// Numbers near 0, near 1 and larger, negative too, and zeros: what gates are made of.
  double magnitude() {
    switch (integer(0, 4)) {
      case 0:
        return 0;
      case 1:
        return std::exp(random_.uniform(-60, 0));
      case 2:
        return 1 + random_.uniform(-1e-3, 1e-3);
      case 3:
        return random_.uniform(5, 15);
      default:
        return random_.uniform(0, 2);
    }
  }
  double real() { return flag() ? magnitude() : -magnitude(); }
  Complex complex() { return std::polar(magnitude(), random_.uniform(-3.1416, 3.1416)); }
  /// |a| <= 1, often all but 1, or real.
  Complex transition(bool is_complex) {
    const double modulus = flag() ? random_.uniform(0.99, 1) : std::min(magnitude(), 1.0);
    return is_complex ? std::polar(modulus, random_.uniform(-3.1416, 3.1416))
                      : Complex(flag() ? modulus : -modulus);
  }

 private:
  Random& random_;
};

template <class Value, class F>
Array<Value> fill(const Dims& dims, const F& draw) {
  Array<Value> values(elements(dims));
  for (Value& value : values) value = draw();
  return values;
}

void run_linear(Draw& draw, std::uint64_t seed) {
  auto c = draw.a_case<linear::Case>(seed);
  c.dtype = draw.one_of(linear::kDTypes);
  linear::check(c, linear::run_on(c, fill<Complex>(c.dims, [&] {
                                    return draw.transition(is_complex(c.dtype));
                                  })));
}

void run_polar(Draw& draw, std::uint64_t seed) {
  auto c = draw.a_case<polar::Case>(seed);
  c.dtype = draw.one_of(kRealDTypes);
  c.gradient = draw.flag();
  polar::check(c, polar::run_on(c, fill<Complex>(c.dims, [&] { return draw.complex(); })));
}

void run_simple(Draw& draw, std::uint64_t seed) {
  auto c = draw.a_case<simple::Case>(seed);
  c.dtype = draw.one_of(kRealDTypes);
  c.gradient = draw.flag();
  c.normalize = draw.flag();
  simple::check(c, simple::run_on(c, fill<double>(c.dims, [&] { return draw.real(); })));
}

void run_gate_loop(Draw& draw, std::uint64_t seed) {
  constexpr oracle::HeadDims kLargest[] = {{1, 400, 2, 20, 20},
                                           {3, 70, 3, 5, 40},
                                           {2, 40, 2, 70, 7},
                                           {1, 150, 2, 80, 90},
                                           {1, 2000, 1, 2, 3}};
  const oracle::HeadDims most = draw.one_of(kLargest);
  const auto size = [&](std::int64_t high) {
    return draw.integer(0, 9) == 0 ? draw.integer(0, 1) : draw.integer(1, high);
  };
  gate_loop::Case c{.dtype = draw.one_of(kRealDTypes),
                    .dims = {size(most.batch), size(most.time), size(most.heads), size(most.keys),
                             size(most.values)},
                    .complex = draw.flag(),
                    .per_key = draw.flag(),
                    .reverse = draw.flag(),
                    .layout = draw.one_of(kLayouts),
                    .states = draw.flag(),
                    .gradient = draw.flag(),
                    .threads = static_cast<int>(draw.integer(1, 4)),
                    .seed = seed};
  if (draw.integer(0, 2) == 0) {
    c.dims.heads = size(24);
    c.dims.keys = c.dims.values = std::int64_t{1} << draw.integer(1, 3);
  }
  if (!c.per_key && draw.integer(0, 3) == 0) {
    c.feature_map = recurrence::FeatureMap::kTaylor;
    c.dims.keys = std::min<std::int64_t>(c.dims.keys, 12);
  }
  Array<Complex> a(gate_loop::transition_count(c));
  for (Complex& value : a) value = draw.transition(c.complex);
  gate_loop::check(c, gate_loop::run_on(c, a));
}

void run_rms_norm(Draw& draw, std::uint64_t) {
  rms_norm::check({.dtype = draw.one_of(kRealDTypes),
                   .rows = draw.integer(0, 400),
                   .columns = draw.integer(0, 300),
                   .layout = draw.flag() ? Layout::kContiguous : Layout::kMisaligned,
                   .threads = static_cast<int>(draw.integer(1, 4))});
}

TEST(Differential, MatchesTheOracle) {
  for_drawn_cases(300, [](Random& random, std::uint64_t seed) {
    Draw draw(random);
    recurrence::cpu::set_stream_bytes(draw.flag() ? 0 : recurrence::cpu::kStreamBytes);
    using Runner = void (*)(Draw&, std::uint64_t);
    constexpr Runner kRunners[] = {run_linear, run_polar, run_simple, run_gate_loop, run_rms_norm};
    draw.one_of(kRunners)(draw, seed);
  });
  recurrence::cpu::set_stream_bytes(recurrence::cpu::kStreamBytes);
}

}  // namespace
}  // namespace gateloop::testing
