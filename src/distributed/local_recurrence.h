#pragma once

/// The recurrences of src/ops on one block, below autograd: forward, backward, and the product of
/// the transitions, in which alone they differ when time is sharded.
#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace gateloop::distributed {

using OptionalTensor = std::optional<at::Tensor>;
using Tensors = std::vector<at::Tensor>;

class LocalRecurrence {
 public:
  explicit LocalRecurrence(bool reverse) : reverse_(reverse) {}
  struct Outputs {
    at::Tensor y, final_state;
    Tensors saved;  // for backward()
  };

  virtual ~LocalRecurrence() = default;

  /// `sequences` as the operator takes them, (B, T, ...); `initial_state` (B or N, ...) or absent.
  /// Without `keep` nothing is saved.
  virtual Outputs forward(const Tensors& sequences, const OptionalTensor& initial_state,
                          const OptionalTensor& cu_seqlens, bool keep) const = 0;
  /// Gradients of the sequences, then of the initial state. Absent gradients are zero.
  virtual Tensors backward(const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                           const Tensors& sequences, const OptionalTensor& initial_state,
                           const Tensors& saved, const OptionalTensor& cu_seqlens) const = 0;
  /// What is left of a state of ones where nothing comes in; broadcasts to a state.
  virtual at::Tensor product(const Tensors& sequences, const OptionalTensor& cu_seqlens) const = 0;

  /// The gradient of the initial state through y alone, of dy (B, T, ...), T > 0: one pass of the
  /// adjoint, which costs what forward() does, 2 to 5 times less than backward(). Not of packed
  /// sequences.
  at::Tensor initial_state_gradient(const at::Tensor& dy, const Tensors& sequences) const;

 protected:
  bool reverse() const { return reverse_; }

 private:
  /// The state after a scan in the other direction. Its transitions are those of `sequences`. Its
  /// input is what `dy` adds to the gradient of the state where the first sequence is `first`.
  virtual at::Tensor run_back(const Tensors& sequences, const at::Tensor& first,
                              const at::Tensor& dy, const OptionalTensor& initial_state) const = 0;

  bool reverse_;
};

/// (a, x), (q, k, v, z), (q, kv, z), and of wide heads (q, k, v, a).
std::unique_ptr<LocalRecurrence> local_linear_recurrence(bool reverse);
std::unique_ptr<LocalRecurrence> local_polar_gate_loop(bool reverse);
std::unique_ptr<LocalRecurrence> local_simple_gate_loop(bool reverse, bool normalize_input);
std::unique_ptr<LocalRecurrence> local_wide_gate_loop(bool reverse, std::string feature_map);

}  // namespace gateloop::distributed
