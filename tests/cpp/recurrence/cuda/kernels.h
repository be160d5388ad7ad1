#pragma once

/// The cases of tests/cpp/recurrence on the bodies of the CUDA kernels, run on the CPU.
#include <algorithm>
#include <cstddef>

#include "../harness.h"
#include "../linear_recurrence_case.h"
#include "../polar_gate_loop_case.h"
#include "../simple_gate_loop_case.h"
#include "host_grid.h"
#include "recurrence/cuda/linear_recurrence-inl.h"
#include "recurrence/cuda/polar_gate_loop-inl.h"
#include "recurrence/cuda/simple_gate_loop-inl.h"

namespace gateloop::testing::cuda {

/// A whole operation as the device runs it.
template <class Params>
void run_on_host(const Params& p, const Order& order = {}, Traffic* traffic = nullptr) {
  visit(p, [&]<class Tile, class Op>(const Op& op) {
    Schedule schedule = schedule_of<Tile>(p);
    const ScanScratch sizes = scratch_of<typename Op::Value, Tile>(schedule);
    // Exactly of the size given, and full of NaN.
    const Scratch scratch(sizes.total);
    auto* const bytes = static_cast<std::byte*>(scratch.get());
    std::fill_n(bytes, sizes.total, std::byte{0xFF});
    std::fill_n(bytes, sizes.cleared, std::byte{0});
    set_scratch(schedule, sizes, bytes);
    run_grid<Tile>(op, schedule, {bytes, bytes + sizes.total}, order, traffic);
  });
}

/// While it lives, execute() of this operation runs the body of its CUDA kernel in this order.
template <class Params>
class OnHost {
 public:
  explicit OnHost(const Order& order, Traffic* traffic = nullptr) {
    replacement<Params> = [=](const Params& p) { run_on_host(p, order, traffic); };
  }
  ~OnHost() { replacement<Params> = nullptr; }
  OnHost(const OnHost&) = delete;
  OnHost& operator=(const OnHost&) = delete;
};

/// Reals of storage that a (B, T, D) element takes, and of saved states that a block takes.
struct Reals {
  int in, out, saved;
};

struct Linear {
  using Forward = recurrence::LinearRecurrence;
  using Backward = recurrence::LinearRecurrenceBackward;
  using Case = linear::Case;
  static constexpr auto& kDTypes = linear::kDTypes;
  static constexpr Reals kForward{2, 1, 0}, kBackward{3, 2, 0};  // a x | h, a h dh | da dx
  static auto run(const Case& c) { return linear::run(c); }
  static void check(const Case& c) { linear::check(c); }
  template <class Outcome>
  static void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
    linear::expect_same(a, b, what);
  }
};
struct Polar {
  using Forward = recurrence::PolarGateLoop;
  using Backward = recurrence::PolarGateLoopBackward;
  using Case = polar::Case;
  static constexpr auto& kDTypes = kRealDTypes;
  // q k v z | y, q k v z dy | dq dk dv dz
  static constexpr Reals kForward{5, 1, 2}, kBackward{6, 5, 2};
  static auto run(const Case& c) { return polar::run(c); }
  static void check(const Case& c) { polar::check(c); }
  template <class Outcome>
  static void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
    polar::expect_same(a, b, what);
  }
};
struct Simple {
  using Forward = recurrence::SimpleGateLoop;
  using Backward = recurrence::SimpleGateLoopBackward;
  using Case = simple::Case;
  static constexpr auto& kDTypes = kRealDTypes;
  static constexpr Reals kForward{3, 1, 1},
      kBackward{4, 3, 1};  // q kv z | y, q kv z dy | dq dkv dz
  static auto run(const Case& c) { return simple::run(c); }
  static void check(const Case& c) { simple::check(c); }
  template <class Outcome>
  static void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
    simple::expect_same(a, b, what);
  }
};

/// Forward and backward.
template <class Op>
struct Kernels {
  explicit Kernels(const Order& order, Traffic* forward_traffic = nullptr,
                   Traffic* backward_traffic = nullptr)
      : forward(order, forward_traffic), backward(order, backward_traffic) {}
  OnHost<typename Op::Forward> forward;
  OnHost<typename Op::Backward> backward;
};

}  // namespace gateloop::testing::cuda
