#pragma once

/// What the forms of gate_loop for wide heads share (docs/math.md): products of transitions, never
/// quotients. Sequences are (B, T, H, C), or (B, T, H) transitions of whole heads.
#include <ATen/ATen.h>

#include "ops/internal.h"

namespace gateloop::ops {

inline at::Tensor real_part(const at::Tensor& t) { return t.is_complex() ? at::real(t) : t; }

/// (B, T, H) -> (B, H, T, 1), and (B, T, H, C) -> (B, H, T, C).
at::Tensor by_head(const at::Tensor& t);

struct Turned {
  at::Tensor q, k, v, a;  // in scan order and in the accumulation type
};
Turned turned(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
              bool reverse);

/// Π of a over steps 0 .. t, t included, in the shape of a.
at::Tensor products_to(const at::Tensor& a);
/// Π of a over the steps after s, in the shape of a.
at::Tensor products_after(const at::Tensor& a);
/// Π of a over all steps: (B, H, 1), or (B, H, K).
at::Tensor decay_of(const at::Tensor& a);

/// q_t · k_s times the real parts of what decays from s to t, of pairs of steps; with transitions
/// per key the decay weighs every product of a key. queries, keys: (B, H, T, K) -> (B, H, t, s).
/// `map`: products of their features in place of q_t · k_s.
at::Tensor scores_inside(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& a,
                         c10::string_view map = "none");

/// Re(x y^T), without the complex product where both are complex.
at::Tensor scores_of(const at::Tensor& x, const at::Tensor& y);

/// Σ_t k_t^T v_t of keys (B, H, T, K), real or complex, and real values (B, H, T, V).
at::Tensor written(const at::Tensor& keys, const at::Tensor& values);

/// The state after the last step: (B, H, K, V).
at::Tensor state_after(const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
                       const OptionalTensor& initial_state);

}  // namespace gateloop::ops
