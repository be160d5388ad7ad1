#pragma once

/// Outputs without memory, sizes symbolic.
#include <ATen/ATen.h>

#include "gateloop/recurrence.h"

namespace gateloop::ops {

/// (B, T, D) as `like`, contiguous.
inline at::Tensor empty_sequence(const at::Tensor& like) {
  return at::empty_symint(like.sym_sizes(), like.options());
}

/// (B, D) of a (B, T, D) sequence.
inline at::Tensor empty_state(const at::Tensor& sequence, at::ScalarType dtype) {
  return at::empty_symint({sequence.sym_size(0), sequence.sym_size(2)},
                          sequence.options().dtype(dtype));
}

/// (B, blocks, D) of a (B, T, D) sequence.
inline at::Tensor empty_saved_states(const at::Tensor& sequence, at::ScalarType dtype) {
  const c10::SymInt blocks =
      (sequence.sym_size(1) + (recurrence::kSavedStateBlock - 1)) / recurrence::kSavedStateBlock;
  return at::empty_symint({sequence.sym_size(0), blocks, sequence.sym_size(2)},
                          sequence.options().dtype(dtype));
}

}  // namespace gateloop::ops
