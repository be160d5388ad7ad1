#include "ops/checks.h"

#include <algorithm>
#include <sstream>

namespace gateloop::ops {
namespace {

std::string names(std::initializer_list<at::ScalarType> dtypes) {
  std::ostringstream out;
  const char* separator = "";
  for (const auto dtype : dtypes) {
    out << separator << dtype;
    separator = ", ";
  }
  return out.str();
}

}  // namespace

at::ScalarType accumulation_type(at::ScalarType storage) {
  return storage == at::kBFloat16 || storage == at::kHalf ? at::kFloat : storage;
}

void check_sequence(const char* op, const char* name, const at::Tensor& t,
                    std::initializer_list<at::ScalarType> dtypes) {
  TORCH_CHECK(t.dim() == 3, op, ": ", name, " must be (B, T, D), got a tensor of rank ", t.dim(),
              " with sizes ", t.sym_sizes());
  TORCH_CHECK_TYPE(std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) != dtypes.end(), op,
                   ": ", name, " must be one of ", names(dtypes), ", got ", t.scalar_type());
}

void check_matches(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                   const at::Tensor& like, std::int64_t channel_factor) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
                   like.scalar_type(), " as ", like_name, " is, got ", t.scalar_type());
  TORCH_CHECK(t.device() == like.device(), op, ": ", name, " must be on ", like.device(), " as ",
              like_name, " is, got ", t.device());
  auto expected = like.sym_sizes().vec();
  expected.back() = expected.back() * channel_factor;
  TORCH_CHECK(t.sym_sizes() == c10::SymIntArrayRef(expected), op, ": ", name, " must be ",
              c10::SymIntArrayRef(expected), " to go with ", like_name, ", got ", t.sym_sizes());
}

void check_state(const char* op, const char* name, const std::optional<at::Tensor>& state,
                 const at::Tensor& sequence, at::ScalarType dtype) {
  if (!state.has_value() || !state->defined()) return;
  const std::vector<c10::SymInt> expected = {sequence.sym_size(0), sequence.sym_size(2)};
  TORCH_CHECK_TYPE(state->scalar_type() == dtype, op, ": ", name, " must be ", dtype, " for ",
                   sequence.scalar_type(), " sequences, got ", state->scalar_type());
  TORCH_CHECK(state->device() == sequence.device(), op, ": ", name, " must be on ",
              sequence.device(), ", got ", state->device());
  TORCH_CHECK(state->sym_sizes() == c10::SymIntArrayRef(expected), op, ": ", name,
              " must be (B, D) = ", c10::SymIntArrayRef(expected), ", got ", state->sym_sizes());
}

void check_linear_recurrence(const at::Tensor& a, const at::Tensor& x,
                             const std::optional<at::Tensor>& initial_state) {
  constexpr auto op = "gateloop::linear_recurrence";
  check_sequence(op, "x", x, kRecurrenceTypes);
  check_matches(op, "a", a, "x", x);
  check_state(op, "initial_state", initial_state, x, accumulation_type(x.scalar_type()));
}

void check_gate_loop(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& z, const std::optional<at::Tensor>& initial_state) {
  constexpr auto op = "gateloop::gate_loop";
  check_sequence(op, "q", q, kRealTypes);
  check_matches(op, "k", k, "q", q);
  check_matches(op, "v", v, "q", q);
  check_matches(op, "z", z, "q", q, 2);
  check_state(op, "initial_state", initial_state, q,
              at::toComplexType(accumulation_type(q.scalar_type())));
}

void check_simple_gate_loop(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z,
                            const std::optional<at::Tensor>& initial_state) {
  constexpr auto op = "gateloop::simple_gate_loop";
  check_sequence(op, "q", q, kRealTypes);
  check_matches(op, "kv", kv, "q", q);
  check_matches(op, "z", z, "q", q);
  check_state(op, "initial_state", initial_state, q, accumulation_type(q.scalar_type()));
}

}  // namespace gateloop::ops
