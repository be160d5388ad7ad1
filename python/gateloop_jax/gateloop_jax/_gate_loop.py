"""The GateLoop read: S_t = a_t S_{t-1} + k_t^T v_t, y_t = q_t Re(S_t), with max heads channel by
channel.

gate_loop takes the transition a and is the linear recurrence between two elementwise passes, which
XLA fuses with their surroundings; heads wider than one channel are in _wide_heads.py.
polar_gate_loop takes what a is computed from and is one kernel: gate, recurrence and read-out in
one pass over memory. One pass back recomputes the states from one kept every few steps.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gateloop_jax import _checks
from gateloop_jax._forms import FORMS
from gateloop_jax._linear_recurrence import carried
from gateloop_jax._packing import Packing
from gateloop_jax._primitive import (
    accumulation,
    bind,
    keep,
    kept_shape,
    one_program,
    read_primitives,
    to_complex,
)
from gateloop_jax._time_sharding import AxisName, run_over_axis
from gateloop_jax._wide_heads import FeatureMap, read_heads

Form = Literal["auto", "scan", "attention", "recurrent"]


@one_program
def gate_loop(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    a: ArrayLike,
    initial_state: ArrayLike | None = None,
    reverse: bool = False,
    *,
    segment_ids: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    form: Form = "auto",
    feature_map: FeatureMap = "none",
    num_segments: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """S_t = a_t S_{t-1} + k_t^T v_t, y_t = q_t Re(S_t); with `reverse` from the last step on.

    q, k:          (B, T, D) for max heads, one channel each, or (B, T, H, K) for wider ones;
                   float32, float64, bfloat16 or float16.
    v:             (B, T, D) or (B, T, H, V), in the dtype of q.
    a:             (B, T, D), or (B, T, H), one for each head, or (B, T, H, K), one for each key;
                   complex64 (complex128 for float64), or real: float32 (float64).
    initial_state: (B, D), or (B, H, K, V), in the dtype of a.
    form:          how to compute it; values and gradients are the same. "scan": linear in T; "auto"
                   takes it. "attention": the surrogate attention of section 3.3, T² work, in
                   tiles. "recurrent": step by step; a backward pass has T / 64 + 64 states in
                   memory.
    feature_map:   "taylor": of heads, with a transition for each. The Taylor features of q and k
                   (arXiv 2312.04927) take the place of q and k: their products are 1 + s + s²/2
                   with s = q · k. States then have 1 + K + K (K + 1) / 2 keys. No form has the
                   features of all T in memory.
    segment_ids, mask, num_segments, axis_name: as linear_recurrence takes them; the output at
                   padding is zero. States are (B, N, D) or (B, N, H, K, V) with num_segments.
    Returns (y as v, in the dtype of q, final_state as initial_state is).

    Wider heads have kernels on the CPU. Elsewhere they are read in blocks of 64 steps, as products
    of matrices in full float32; products of transitions in a block must then be finite numbers, as
    they are where |a| <= 1. With num_segments those of a whole sequence must be, on CPUs too. A
    backward pass keeps one state in 64 steps, the kernels with a transition for each key one in
    16, and computes states again from it.
    """
    name = "gate_loop"
    q = jnp.asarray(q)
    if form not in FORMS:
        raise ValueError(f"{name}: form must be one of {', '.join(FORMS)}, got {form!r}")
    heads: Callable[..., tuple[Array, Array]] = functools.partial(
        read_heads,
        reverse=bool(reverse),
        read_form=FORMS[form],
        feature_map=feature_map,
        segment_ids=segment_ids,
        mask=mask,
        num_segments=num_segments,
        axis_name=axis_name,
    )
    if q.ndim == 4:
        return heads(q, k, v, a, initial_state)
    if q.ndim != 3:
        raise ValueError(f"{name}: q must be (B, T, D) or (B, T, H, K), got shape {q.shape}")
    q = _checks.sequence(name, "q", q, _checks.REAL)
    if feature_map != "none":
        raise ValueError(f'{name}: feature_map must be "none" without heads, got {feature_map!r}')
    k, v = _checks.like(name, "k", k, "q", q), _checks.like(name, "v", v, "q", q)
    a = _checks.same_shape(name, "a", a, "q", q.shape)
    _checks.transition(name, a, q)
    packing = Packing.of(name, q.shape[:2], segment_ids, mask, num_segments=num_segments)
    initial = _checks.state(name, initial_state, a, segments=num_segments)
    if form in ("attention", "recurrent"):
        y, final = heads(*(x[..., None] for x in (q, k, v)), a, initial[..., None, None])
        return y[..., 0], final[..., 0, 0]
    if packing is not None:
        q, k, v = (packing.filled(t) for t in (q, k, v))
    return _read(q, k, v, a, initial, bool(reverse), axis_name, packing)


def gate_loop_step(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    a: ArrayLike,
    state: ArrayLike,
    *,
    feature_map: FeatureMap = "none",
) -> tuple[Array, Array]:
    """One step of gate_loop, whose arguments these are without the time; `state` is the one before.

    Returns (y (B, D) or (B, H, V) in the dtype of q, the state after the step).
    Raises TypeError or ValueError, of gate_loop, naming the argument.
    """
    q, k, v, a = (jnp.expand_dims(x, 1) for x in (q, k, v, a))
    y, after = gate_loop(q, k, v, a, state, feature_map=feature_map)
    return y[:, 0], after


@one_program
def polar_gate_loop(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    z: ArrayLike,
    initial_state: ArrayLike | None = None,
    reverse: bool = False,
    *,
    segment_ids: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    num_segments: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """gate_loop with max heads and a = polar_gate(z), fused.

    q, k, v:       (B, T, D), one dtype: float32, float64, bfloat16 or float16.
    z:             (B, T, 2 D) in the same dtype, (re, im) interleaved per channel.
    initial_state: (B, D), complex64 (complex128 for float64).
    segment_ids, mask, num_segments, axis_name: as gate_loop takes them. With segment_ids it is
                   gate_loop: no z stands for the transition 0 at which a sequence begins.
    Returns (y (B, T, D) in the dtype of q, final_state (B, D) complex).
    """
    name = "polar_gate_loop"
    q = _checks.sequence(name, "q", q, _checks.REAL)
    k, v = _checks.like(name, "k", k, "q", q), _checks.like(name, "v", v, "q", q)
    z = _checks.like(name, "z", z, "q", q, parts=2)
    packing = Packing.of(name, q.shape[:2], segment_ids, mask, num_segments=num_segments)
    initial = _checks.state(name, initial_state, q, to_complex(q.dtype), num_segments)
    if packing is not None:
        q, k, v, z = (packing.filled(t) for t in (q, k, v, z))
        if packing.segment_ids is not None:
            return _read(q, k, v, polar_gate(z), initial, bool(reverse), axis_name, packing)
        # Where |z| is so large, the transition is 1 in every format.
        holding = jnp.tile(jnp.array([8192, 0], z.dtype), q.shape[2])
        z = packing.filled(z, holding)
    pairs = z.reshape(*q.shape, 2)

    def run(state: Array, *inputs: Array) -> tuple[Array, Array]:
        y, final_state = bind(
            polar.read_p, *(inputs or (q, k, v)), pairs, state, reverse=bool(reverse)
        )
        return y, final_state

    if axis_name is None:
        return run(initial)
    zeros = jnp.zeros_like(q)
    product = run(jnp.ones_like(initial), zeros, zeros, zeros)[1]
    return run_over_axis(run, product, initial, axis_name, bool(reverse))


def polar_gate(z: ArrayLike) -> Array:
    """a = σ(|z|) z/|z|, and 0.5 at z = 0: (re, im) pairs (..., 2 D) -> complex (..., D)."""
    z = jnp.asarray(z)
    return _polar(z.reshape(*z.shape[:-1], z.shape[-1] // 2, 2))


def _polar(pairs: Array) -> Array:
    """(..., D, 2) -> complex (..., D)."""
    wide = pairs.astype(accumulation(pairs.dtype))
    re, im = wide[..., 0], wide[..., 1]
    at_zero = (re == 0) & (im == 0)
    # |z| has no gradient at zero; there both modulus and direction are constants.
    re = jnp.where(at_zero, 1, re)
    modulus = jnp.hypot(re, im)
    scale = jnp.where(at_zero, 0.5, jax.nn.sigmoid(modulus) / modulus)
    return jax.lax.complex(re * scale, im * scale)


def _read(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    initial: Array,
    reverse: bool,
    axis_name: AxisName | None = None,
    packing: Packing | None = None,
) -> tuple[Array, Array]:
    real = accumulation(q.dtype)
    x = (k.astype(real) * v.astype(real)).astype(a.dtype)
    h, final_state = carried(a, x, initial, reverse, axis_name, packing)
    return (q.astype(real) * h.real).astype(q.dtype), final_state


# ---- The fused primitives ------------------------------------------------------------------------


def _definition(
    q: Array, k: Array, v: Array, z: Array, initial: Array, *, reverse: bool
) -> tuple[Array, Array]:
    return _read(q, k, v, _polar(z), initial, reverse)


polar = read_primitives("gateloop_polar", "polar_gate_loop", _definition, kept_shape, keep)
