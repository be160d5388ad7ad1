#pragma once

/// Outputs, uninitialised, of sizes that may be symbolic.
#include <ATen/ATen.h>

#include "gateloop/recurrence.h"
#include "ops/checks.h"
#include "ops/internal.h"

namespace gateloop::ops {

/// (B, T, D) as `like`, contiguous.
inline at::Tensor empty_sequence(const at::Tensor& like) {
  return at::empty_symint(like.sym_sizes(), like.options());
}

/// (B, D) of a (B, T, D) sequence, or (N, D) of the N that cu_seqlens packs.
inline at::Tensor empty_state(const at::Tensor& sequence, at::ScalarType dtype,
                              const OptionalTensor& cu_seqlens) {
  return at::empty_symint({state_count(sequence, cu_seqlens), sequence.sym_size(2)},
                          sequence.options().dtype(dtype));
}

/// (B, blocks, D) of a (B, T, D) sequence, see saved_state_count().
inline at::Tensor empty_saved_states(const at::Tensor& sequence, at::ScalarType dtype,
                                     const OptionalTensor& cu_seqlens) {
  const auto blocks = saved_count(sequence, recurrence::kSavedStateBlock, cu_seqlens);
  return at::empty_symint({sequence.sym_size(0), blocks, sequence.sym_size(2)},
                          sequence.options().dtype(dtype));
}

/// (B or N, H, K or its features, V) in the dtype of a.
inline at::Tensor empty_head_state(const at::Tensor& q, const at::Tensor& v, const at::Tensor& a,
                                   const OptionalTensor& cu_seqlens, recurrence::FeatureMap map) {
  return at::empty_symint(
      {state_count(q, cu_seqlens), q.sym_size(2), state_keys(q, map), v.sym_size(3)}, a.options());
}

/// (B, chunks, H, 1 or 2, K or its features, V), see saved_chunk_count().
inline at::Tensor empty_saved_chunks(const at::Tensor& q, const at::Tensor& v, const at::Tensor& a,
                                     const OptionalTensor& cu_seqlens, recurrence::FeatureMap map) {
  return at::empty_symint({q.sym_size(0), saved_chunk_count(a, cu_seqlens), q.sym_size(2),
                           a.is_complex() ? 2 : 1, state_keys(q, map), v.sym_size(3)},
                          q.options().dtype(accumulation_type(q.scalar_type())));
}

}  // namespace gateloop::ops
