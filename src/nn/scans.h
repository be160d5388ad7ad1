#pragma once

/// The recurrences as layers call them: on all steps, or on a block of them over a time group.
#include <torch/torch.h>

#include <optional>
#include <tuple>

#include "gateloop/nn/mixer.h"

namespace gateloop::nn {

/// See gateloop/ops.h and gateloop/distributed_ops.h. Returns (y, the final state).
class Scans {
 public:
  using Result = std::tuple<torch::Tensor, torch::Tensor>;

  Scans(const Packing& packing, const std::optional<torch::Tensor>& initial_state, bool reverse)
      : packing_(packing), initial_state_(initial_state), reverse_(reverse) {}

  Result linear_recurrence(const torch::Tensor& a, const torch::Tensor& x) const;
  Result gate_loop(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                   const torch::Tensor& a, c10::string_view feature_map = "none") const;
  Result polar_gate_loop(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                         const torch::Tensor& z) const;
  Result simple_gate_loop(const torch::Tensor& q, const torch::Tensor& kv, const torch::Tensor& z,
                          bool normalize_input) const;

 private:
  bool sharded() const { return !packing_.time_group.empty(); }

  Packing packing_;
  std::optional<torch::Tensor> initial_state_;
  bool reverse_;
};

}  // namespace gateloop::nn
