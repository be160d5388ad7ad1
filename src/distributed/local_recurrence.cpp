#include "distributed/local_recurrence.h"

#include <utility>

#include "gateloop/ops.h"
#include "ops/checks.h"
#include "ops/internal.h"

namespace gateloop::distributed {
namespace {

/// (B, T, ...) zeros as `like` is, of one row of memory.
at::Tensor zeros_as(const at::Tensor& like) {
  auto row = like.sizes().vec();
  row[0] = row[1] = 1;
  return at::zeros(row, like.options()).expand(like.sizes());
}

/// A state of ones (B or N, D) of a sequence (B, T, D).
at::Tensor ones_state(const at::Tensor& like, at::ScalarType dtype,
                      const OptionalTensor& cu_seqlens) {
  const std::int64_t rows = ops::is_given(cu_seqlens) ? cu_seqlens->size(0) - 1 : like.size(0);
  return at::ones({rows, like.size(2)}, like.options().dtype(dtype));
}

class LinearRecurrence final : public LocalRecurrence {
 public:
  using LocalRecurrence::LocalRecurrence;

  Outputs forward(const Tensors& in, const OptionalTensor& initial, const OptionalTensor& cu,
                  bool keep) const override {
    auto [h, final_state] = linear_recurrence(in[0], in[1], initial, reverse(), cu);
    return {h, final_state, keep ? Tensors{h} : Tensors{}};
  }
  Tensors backward(const OptionalTensor& dy, const OptionalTensor& dfinal, const Tensors& in,
                   const OptionalTensor& initial, const Tensors& saved,
                   const OptionalTensor& cu) const override {
    auto [da, dx, dinitial] =
        ops::linear_recurrence_backward(dy, dfinal, in[0], saved[0], initial, reverse(), cu);
    return {da, dx, dinitial};
  }
  at::Tensor product(const Tensors& in, const OptionalTensor& cu) const override {
    const auto type = ops::accumulation_type(in[0].scalar_type());
    return std::get<1>(linear_recurrence(in[0], zeros_as(in[0]), ones_state(in[0], type, cu),
                                         /*reverse=*/false, cu));
  }

 private:
  at::Tensor run_back(const Tensors& in, const at::Tensor&, const at::Tensor& dy,
                      const OptionalTensor& initial) const override {
    return std::get<1>(linear_recurrence(in[0], dy, initial, !reverse()));
  }
};

class PolarGateLoop final : public LocalRecurrence {
 public:
  using LocalRecurrence::LocalRecurrence;

  Outputs forward(const Tensors& in, const OptionalTensor& initial, const OptionalTensor& cu,
                  bool keep) const override {
    if (!keep) {
      auto [y, final_state] = polar_gate_loop(in[0], in[1], in[2], in[3], initial, reverse(), cu);
      return {y, final_state, {}};
    }
    auto [y, final_state, states] =
        ops::polar_gate_loop_forward(in[0], in[1], in[2], in[3], initial, reverse(), cu);
    return {y, final_state, {states}};
  }
  Tensors backward(const OptionalTensor& dy, const OptionalTensor& dfinal, const Tensors& in,
                   const OptionalTensor&, const Tensors& saved,
                   const OptionalTensor& cu) const override {
    auto [dq, dk, dv, dz, dinitial] = ops::polar_gate_loop_backward(dy, dfinal, in[0], in[1], in[2],
                                                                    in[3], saved[0], reverse(), cu);
    return {dq, dk, dv, dz, dinitial};
  }
  at::Tensor product(const Tensors& in, const OptionalTensor& cu) const override {
    const at::Tensor zeros = zeros_as(in[0]);
    const auto type = ops::complex_accumulation_type(in[0].scalar_type());
    return std::get<1>(polar_gate_loop(zeros, zeros, zeros, in[3], ones_state(zeros, type, cu),
                                       /*reverse=*/false, cu));
  }

 private:
  at::Tensor run_back(const Tensors& in, const at::Tensor& q, const at::Tensor& dy,
                      const OptionalTensor& initial) const override {
    return std::get<1>(polar_gate_loop(zeros_as(q), q, dy, in[3], initial, !reverse()));
  }
};

class SimpleGateLoop final : public LocalRecurrence {
 public:
  SimpleGateLoop(bool reverse, bool normalize_input)
      : LocalRecurrence(reverse), normalize_input_(normalize_input) {}

  Outputs forward(const Tensors& in, const OptionalTensor& initial, const OptionalTensor& cu,
                  bool keep) const override {
    if (!keep) {
      auto [y, final_state] =
          simple_gate_loop(in[0], in[1], in[2], initial, reverse(), normalize_input_, cu);
      return {y, final_state, {}};
    }
    auto [y, final_state, states] = ops::simple_gate_loop_forward(in[0], in[1], in[2], initial,
                                                                  reverse(), normalize_input_, cu);
    return {y, final_state, {states}};
  }
  Tensors backward(const OptionalTensor& dy, const OptionalTensor& dfinal, const Tensors& in,
                   const OptionalTensor&, const Tensors& saved,
                   const OptionalTensor& cu) const override {
    auto [dq, dkv, dz, dinitial] = ops::simple_gate_loop_backward(
        dy, dfinal, in[0], in[1], in[2], saved[0], reverse(), normalize_input_, cu);
    return {dq, dkv, dz, dinitial};
  }
  at::Tensor product(const Tensors& in, const OptionalTensor& cu) const override {
    const at::Tensor zeros = zeros_as(in[0]);
    const auto type = ops::accumulation_type(in[0].scalar_type());
    return std::get<1>(simple_gate_loop(zeros, zeros, in[2], ones_state(zeros, type, cu),
                                        /*reverse=*/false, /*normalize_input=*/false, cu));
  }

 private:
  at::Tensor run_back(const Tensors& in, const at::Tensor& q, const at::Tensor& dy,
                      const OptionalTensor& initial) const override {
    // The product is no sequence of bfloat16: it is as wide as the state.
    const auto type = ops::accumulation_type(q.scalar_type());
    const at::Tensor kv = q.to(type) * dy.to(type);
    return std::get<1>(simple_gate_loop(zeros_as(kv), kv, in[2].to(type), initial, !reverse()));
  }

  bool normalize_input_;
};

class WideGateLoop final : public LocalRecurrence {
 public:
  WideGateLoop(bool reverse, std::string feature_map)
      : LocalRecurrence(reverse), map_(std::move(feature_map)) {}

  Outputs forward(const Tensors& in, const OptionalTensor& initial, const OptionalTensor& cu,
                  bool keep) const override {
    if (!keep) {
      auto [y, final_state] =
          ops::chunked_gate_loop(in[0], in[1], in[2], in[3], initial, reverse(), cu, map_);
      return {y, final_state, {}};
    }
    auto [y, final_state, states] =
        ops::chunked_gate_loop_forward(in[0], in[1], in[2], in[3], initial, reverse(), cu, map_);
    return {y, final_state, {states}};
  }
  Tensors backward(const OptionalTensor& dy, const OptionalTensor& dfinal, const Tensors& in,
                   const OptionalTensor&, const Tensors& saved,
                   const OptionalTensor& cu) const override {
    auto [dq, dk, dv, da, dinitial] = ops::chunked_gate_loop_backward(
        dy, dfinal, in[0], in[1], in[2], in[3], saved[0], reverse(), cu, map_);
    return {dq, dk, dv, da, dinitial};
  }
  /// (B or N, H, 1, 1), or (B or N, H, K, 1) of transitions for each key.
  at::Tensor product(const Tensors& in, const OptionalTensor& cu) const override {
    const at::Tensor& a = in[3];
    const at::Tensor channels = a.flatten(2);
    const at::Tensor state = ones_state(channels, a.scalar_type(), cu);
    const auto left =
        std::get<1>(linear_recurrence(channels, zeros_as(channels), state, /*reverse=*/false, cu));
    return left.view({left.size(0), a.size(2), a.dim() == 4 ? a.size(3) : 1, 1});
  }

 private:
  at::Tensor run_back(const Tensors& in, const at::Tensor& q, const at::Tensor& dy,
                      const OptionalTensor& initial) const override {
    return std::get<1>(ops::chunked_gate_loop(zeros_as(q), q, dy, in[3], initial, !reverse(),
                                              /*cu_seqlens=*/{}, map_));
  }

  std::string map_;
};

}  // namespace

at::Tensor LocalRecurrence::initial_state_gradient(const at::Tensor& dy,
                                                   const Tensors& sequences) const {
  // g_t = d_t + conj(a_{t+1}) g_{t+1} and conj(a_1) g_1, all conjugated: the transitions are one
  // step ahead of the inputs.
  const std::int64_t time = dy.size(1);
  const at::Tensor conjugate = dy.conj().resolve_conj(), &first = sequences[0];
  const auto steps = [&](const at::Tensor& t, std::int64_t from, std::int64_t count) {
    return t.narrow(1, reverse_ ? time - from - count : from, count);
  };
  const auto all = [&](std::int64_t from, std::int64_t count) {
    Tensors parts;
    for (const auto& t : sequences) parts.push_back(steps(t, from, count));
    return parts;
  };
  const auto run = [&](std::int64_t from, std::int64_t inputs_from, std::int64_t count,
                       const OptionalTensor& state) {
    return run_back(all(from, count), steps(first, inputs_from, count),
                    steps(conjugate, inputs_from, count), state);
  };
  at::Tensor state = run(time - 1, time - 1, 1, {});  // of nothing: the input of the last step
  if (time > 1) state = run(1, 0, time - 1, state);
  state = run_back(all(0, 1), steps(first, 0, 1), at::zeros_like(steps(dy, 0, 1)), state);
  return state.conj().resolve_conj();
}

std::unique_ptr<LocalRecurrence> local_linear_recurrence(bool reverse) {
  return std::make_unique<LinearRecurrence>(reverse);
}
std::unique_ptr<LocalRecurrence> local_polar_gate_loop(bool reverse) {
  return std::make_unique<PolarGateLoop>(reverse);
}
std::unique_ptr<LocalRecurrence> local_simple_gate_loop(bool reverse, bool normalize_input) {
  return std::make_unique<SimpleGateLoop>(reverse, normalize_input);
}
std::unique_ptr<LocalRecurrence> local_wide_gate_loop(bool reverse, std::string feature_map) {
  return std::make_unique<WideGateLoop>(reverse, std::move(feature_map));
}

}  // namespace gateloop::distributed
