#pragma once

/// Operators stated in torch's operators. They run on devices without a kernel, in spans of time so
/// that they take little memory. Autograd differentiates them twice.
#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "ops/internal.h"

namespace gateloop::ops {

/// An operator on sequences (B, T, ...) that begin in a state (B, ...).
struct Definition {
  struct Results {
    at::Tensor y;            // (B, T, ...)
    at::Tensor final_state;  // (B, ...)
    at::Tensor states;       // (B, blocks, ...), before each block in scan order
  };
  /// Of T > 0 steps; differentiable any number of times. Beside cu_seqlens (N + 1), which is on the
  /// CPU, sequences are (1, T, ...) and states (N, ...); `states` are then the N sequences', one
  /// sequence behind another.
  using Compute =
      std::function<Results(const std::vector<at::Tensor>& sequences,
                            const at::Tensor& initial_state, const OptionalTensor& cu_seqlens)>;
  const char* op;
  Compute compute;
  std::size_t like = 0;               // y is shaped as this sequence
  std::vector<std::int64_t> sizes;    // of a state, without B
  at::ScalarType dtype = at::kFloat;  // of states
  bool reverse = false;
  std::int64_t block = 1;  // steps from one saved state to the next
  std::int64_t width = 1;  // numbers that a step of one batch entry takes while it is computed
  /// Whether `compute` takes cu_seqlens: else packed sequences are computed one after another.
  bool takes_packed = false;
};

/// {y, final_state} of all steps at once, differentiable any number of times. Here and below states
/// have B rows, or N beside cu_seqlens; initial_state is zero where absent.
std::vector<at::Tensor> compute_whole(const Definition& definition,
                                      const std::vector<at::Tensor>& sequences,
                                      const OptionalTensor& initial_state,
                                      const OptionalTensor& cu_seqlens);

/// The same in spans of time, which bounds the memory. Fills tensors that come uninitialised;
/// `states` is undefined where no backward pass follows. Records no graph.
void compute_in_spans(const Definition& definition, const std::vector<at::Tensor>& sequences,
                      const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                      const Definition::Results& outputs);

/// Fills `gradients`, shaped as the sequences and as initial_state, from dy and dfinal_state. Each
/// span is computed again from `states`, which compute_in_spans() wrote. `op` is named in errors.
void differentiate_in_spans(const char* op, const Definition& definition,
                            const std::vector<at::Tensor>& sequences, const at::Tensor& states,
                            const OptionalTensor& dy, const OptionalTensor& dfinal_state,
                            const OptionalTensor& cu_seqlens,
                            const std::vector<at::Tensor>& gradients);

/// The rows of `h` (B, T, D), T > 0, and initial_state (B, D) that are states before a block; of
/// packed sequences those of one behind another, (1, blocks, D).
at::Tensor states_before_blocks(const at::Tensor& h, const at::Tensor& initial_state,
                                std::int64_t block, bool reverse, const OptionalTensor& cu_seqlens);

/// In log2(T) passes over the sequence, each of which torch can differentiate: for the derivatives
/// that needs_pieces() names. All else is computed by blocked_scan(), in fewer passes.
Definition linear_recurrence_definition(const at::Tensor& x, bool reverse);
Definition polar_gate_loop_definition(const at::Tensor& q, bool reverse);
Definition simple_gate_loop_definition(const at::Tensor& q, bool reverse, bool normalize_input);
/// Of wide heads; its states are (B, chunks, H, K or its features, V) in the dtype of a.
Definition chunked_gate_loop_definition(const at::Tensor& q, const at::Tensor& v,
                                        const at::Tensor& a, bool reverse,
                                        c10::string_view feature_map);

}  // namespace gateloop::ops
