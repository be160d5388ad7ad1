"""h_t = a_t h_{t-1} + x_t.

Three primitives: the recurrence; its tangent, a linear map; and that map's adjoint, which has a
kernel of its own because one pass backward gives all gradients. Forward mode stops at the tangent,
reverse mode transposes it. Derivatives of the tangent and the adjoint come from their definitions
by the recurrence itself. So every order works in every mode.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from gateloop_jax import _checks
from gateloop_jax._packing import Packing, along
from gateloop_jax._primitive import bind, flip, one_program, primitive, set_transpose
from gateloop_jax._time_sharding import AxisName, run_over_axis


@one_program
def linear_recurrence(
    a: ArrayLike,
    x: ArrayLike,
    initial_state: ArrayLike | None = None,
    reverse: bool = False,
    *,
    segment_ids: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    num_segments: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """h_t = a_t h_{t-1} + x_t; with `reverse` from the last step to the first.

    a, x:          (B, T, D), one dtype: float32, float64, complex64, complex128, bfloat16, float16.
    initial_state: (B, D); float32 for bfloat16 and float16 sequences, else their dtype.
    segment_ids, mask: packed and padded sequences, (B, T) integers and bool. Steps of one number
                   side by side are a sequence, and the state begins at zero where it changes. A
                   step whose mask is false neither decays nor feeds the state; its h is zero.
    num_segments:  N, static: states are (B, N, D), one for each number 0 to N - 1 of segment_ids,
                   as jax.ops.segment_sum has them. A sequence of number n begins at
                   initial_state[:, n]; final_state[:, n] is that of the last of this number, the
                   initial state if there is none. Sequences of other numbers begin at zero, and
                   their final states are dropped.
    axis_name:     of the mesh axis, or axes, that shard time inside jax.shard_map, where all
                   sequences are this device's block: those of the first device come first. The
                   initial and the final state are those of the whole. The device of the first step
                   read uses the initial one. A block is read three times.
    Returns (h (B, T, D) in the dtype of x, final_state (B, D) in the dtype of the state).
    Raises TypeError or ValueError naming the argument, what was expected and what came.
    """
    name = "linear_recurrence"
    x = _checks.sequence(name, "x", x, _checks.REAL + _checks.COMPLEX)
    a = _checks.like(name, "a", a, "x", x)
    packing = Packing.of(name, x.shape[:2], segment_ids, mask, num_segments=num_segments)
    initial = _checks.state(name, initial_state, x, segments=num_segments)
    if packing is not None:
        x = packing.filled(x)
    h, final_state = carried(a, x, initial, bool(reverse), axis_name, packing)
    return h if packing is None else packing.filled(h), final_state


def carried(
    a: Array,
    x: Array,
    initial_state: Array,
    reverse: bool,
    axis_name: AxisName | None,
    packing: Packing | None = None,
) -> tuple[Array, Array]:
    """recurrence(), over the blocks of an axis if there is one; with `packing` from x whose padding
    is filled, and from any a there."""
    if packing is not None and packing.num_segments is not None:
        return _carried_of_each(a, x, initial_state, reverse, axis_name, packing)
    if packing is not None:
        a = packing.transitions(a, reverse, axis_name)

    def run(state: Array) -> tuple[Array, Array]:
        h, final_state = recurrence(a, x, state, reverse=reverse)
        return h, final_state

    if axis_name is None:
        return run(initial_state)
    # What is left of a state of ones: no division, and right derivatives where a is zero.
    ones = jnp.ones_like(initial_state)
    product = recurrence(a, jnp.zeros_like(x), ones, reverse=reverse)[1]
    return run_over_axis(run, product, initial_state, axis_name, reverse)


def _carried_of_each(
    a: Array,
    x: Array,
    states: Array,
    reverse: bool,
    axis_name: AxisName | None,
    packing: Packing,
) -> tuple[Array, Array]:
    """Of states (B, N, D). At the step where a sequence begins, what is left of its state is a part
    of the input."""
    dtype = x.dtype
    a, x = packing.filled(a, 1).astype(states.dtype), x.astype(states.dtype)
    begins = packing.begins(reverse, axis_name, first=True)
    assert begins is not None
    begins = along(begins, a)
    x = x + jnp.where(begins, a * packing.states_of_steps(states), 0)
    nothing = jnp.zeros_like(states[:, 0])
    h, _ = carried(jnp.where(begins, 0, a), x, nothing, reverse, axis_name)
    return h.astype(dtype), packing.after_last(h, states, reverse, axis_name)


def recurrence(a: Array, x: Array, initial_state: Array, *, reverse: bool) -> list[Array]:
    return bind(recurrence_p, a, x, initial_state, reverse=reverse)


def _previous(h: Array, initial_state: Array, reverse: bool) -> Array:
    """States before each step, (..., T, D) in the accumulation dtype."""
    first = initial_state[..., None, :]
    if h.shape[-2] == 0:
        return h.astype(first.dtype)
    if reverse:
        return jnp.concatenate([h[..., 1:, :].astype(first.dtype), first], -2)
    return jnp.concatenate([first, h[..., :-1, :].astype(first.dtype)], -2)


def _definition(a: Array, x: Array, initial_state: Array, *, reverse: bool) -> list[Array]:
    """For the platforms without our kernel: log T passes, but parallel in time."""
    if x.shape[-2] == 0:
        return [x, initial_state]
    wide_a, wide_x = (flip(s.astype(initial_state.dtype), reverse) for s in (a, x))
    first = wide_x[..., :1, :] + wide_a[..., :1, :] * initial_state[..., None, :]
    wide_x = jnp.concatenate([first, wide_x[..., 1:, :]], -2)

    def combine(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return then[0] * first[0], then[0] * first[1] + then[1]

    h = lax.associative_scan(combine, (wide_a, wide_x), axis=x.ndim - 2)[1]
    return [flip(h, reverse).astype(x.dtype), h[..., -1, :]]


def _tangent(
    a: Array,
    h: Array,
    initial_state: Array,
    da: Array,
    dx: Array,
    dinitial: Array,
    *,
    reverse: bool,
) -> list[Array]:
    moved = da.astype(initial_state.dtype) * _previous(h, initial_state, reverse)
    return recurrence(a, (dx + moved).astype(dx.dtype), dinitial, reverse=reverse)


def _adjoint(
    a: Array, h: Array, initial_state: Array, dh: Array, dfinal: Array, *, reverse: bool
) -> list[Array]:
    """-> da, dx, dinitial_state, in the convention of the kernel: the conjugates of JAX's."""
    if a.shape[-2] == 0:
        return [a, a, dfinal]
    conj = jnp.conj(a)
    # g_t = dh_t + conj(a_{t+1}) g_{t+1}: the transition of the step before, and first none.
    one = jnp.ones_like(a[..., :1, :])
    shifted = (
        jnp.concatenate([one, conj[..., :-1, :]], -2)
        if reverse
        else jnp.concatenate([conj[..., 1:, :], one], -2)
    )
    g, last = recurrence(shifted, dh, dfinal, reverse=not reverse)
    wide = g.astype(last.dtype)
    da = (wide * jnp.conj(_previous(h, initial_state, reverse))).astype(a.dtype)
    return [da, g, conj[..., -1 if reverse else 0, :].astype(last.dtype) * last]


recurrence_p = primitive(
    "gateloop_linear_recurrence",
    _definition,
    lambda a, x, initial: [(x.shape, x.dtype), (initial.shape, initial.dtype)],
    kernel="linear_recurrence",
)
tangent_p = primitive(
    "gateloop_linear_recurrence_tangent",
    _tangent,
    lambda a, h, initial, *_: [(h.shape, h.dtype), (initial.shape, initial.dtype)],
)
adjoint_p = primitive(
    "gateloop_linear_recurrence_adjoint",
    _adjoint,
    lambda a, h, initial, *_: [
        (a.shape, a.dtype),
        (a.shape, a.dtype),
        (initial.shape, initial.dtype),
    ],
    kernel="linear_recurrence_backward",
)


def _recurrence_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array, ...], *, reverse: bool
) -> tuple[list[Array], list[Array]]:
    a, x, initial = primals
    h, final = recurrence(a, x, initial, reverse=reverse)
    moves = map(jax.interpreters.ad.instantiate_zeros, tangents)
    return [h, final], bind(tangent_p, a, h, initial, *moves, reverse=reverse)


def _tangent_transpose(
    a: Array, h: Array, initial: Array, dh: Array, dfinal: Array, *, reverse: bool
) -> list[Array]:
    given = (jnp.conj(dh), jnp.conj(dfinal))
    return [jnp.conj(g) for g in bind(adjoint_p, a, h, initial, *given, reverse=reverse)]


def _recurrence_transpose(a: Array, dh: Array, dfinal: Array, *, reverse: bool) -> list[Array]:
    # Linear in x and the state as the tangent is in theirs; what multiplies da does not count.
    h, initial = jnp.zeros_like(dh), jnp.zeros_like(dfinal)
    return _tangent_transpose(a, h, initial, dh, dfinal, reverse=reverse)[1:]


def _adjoint_transpose(
    a: Array, h: Array, initial: Array, da: Array, dx: Array, dinitial: Array, *, reverse: bool
) -> list[Array]:
    def linear(dh: Array, dfinal: Array) -> list[Array]:
        return _adjoint(a, h, initial, dh, dfinal, reverse=reverse)

    return list(jax.linear_transpose(linear, h, initial)([da, dx, dinitial]))


jax.interpreters.ad.primitive_jvps[recurrence_p] = _recurrence_jvp
set_transpose(recurrence_p, 1, _recurrence_transpose)
set_transpose(tangent_p, 3, _tangent_transpose)
set_transpose(adjoint_p, 3, _adjoint_transpose)
