"""gate_loop of heads wider than one channel. On the CPU it is a kernel. Elsewhere, and in programs
that XLA partitions, it is a definition in blocks of time (docs/math.md).

Inside a block of 64 steps all is products of matrices; lax.scan carries the state from one block to
the next. Differentiated backward, a block is computed again from the state before it. So one state
a block is in memory.

The decay between two steps is a product of the transitions themselves, taken by halves. A step in
the second half of a span reads one in the first through a product of two: (transitions up to it in
its half) (transitions after the other in its half). Nothing is divided and no logarithm taken, so
that zeros are exact. Where |a| <= 1 every factor is at most 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from gateloop_jax import _checks, _library, _sharding
from gateloop_jax._exact_products import Exact
from gateloop_jax._packing import Packing
from gateloop_jax._primitive import (
    Form,
    accumulation,
    bind,
    is_partitioned,
    parts,
    product,
    read_primitives,
    unkept,
)
from gateloop_jax._segments_of_heads import add_states
from gateloop_jax._time_sharding import AxisName, run_over_axis

FeatureMap = Literal["none", "taylor"]
# q, k, v, a (B, T, H) or (B, T, H, K), the state, reverse, feature_map -> y, the state.
Read = Callable[..., tuple[Array, Array]]

# Steps a block, a power of two.
BLOCK = 64
# recurrence.h, gate_loop_chunk: steps between states that the kernel keeps, and where each key has
# its own transition.
KEPT_STEPS, KEPT_STEPS_PER_KEY = 64, 16


def read_heads(
    q: Array,
    k: ArrayLike,
    v: ArrayLike,
    a: ArrayLike,
    initial_state: ArrayLike | None,
    *,
    reverse: bool,
    read_form: Read,
    feature_map: FeatureMap,
    segment_ids: ArrayLike | None,
    mask: ArrayLike | None,
    num_segments: int | None,
    axis_name: AxisName | None,
) -> tuple[Array, Array]:
    """gate_loop of q, k (B, T, H, K), v (B, T, H, V), a (B, T, H) or (B, T, H, K)."""
    name = "gate_loop"
    if q.dtype.name not in _checks.REAL:
        raise TypeError(f"{name}: q must be one of {', '.join(_checks.REAL)}, got {q.dtype}")
    if feature_map not in ("none", "taylor"):
        raise ValueError(f'{name}: feature_map must be "none" or "taylor", got {feature_map!r}')
    k, v, a = _checks.like(name, "k", k, "q", q), jnp.asarray(v), jnp.asarray(a)
    if v.ndim != 4:
        raise ValueError(f"{name}: v must be (B, T, H, V), got shape {v.shape}")
    v = _checks.same_shape(name, "v", v, "q", (*q.shape[:3], v.shape[3]))
    if v.dtype != q.dtype:
        raise TypeError(f"{name}: v must be {q.dtype} as q is, got {v.dtype}")
    per_key = a.ndim == 4 and feature_map == "none"
    a = _checks.same_shape(name, "a", a, "q", q.shape if per_key else q.shape[:3])
    _checks.transition(name, a, q)
    for sequence in (q, k, v, a):
        _sharding.refuse_sharded_time(name, jax.typeof(sequence), 1)
    packing = Packing.of(name, q.shape[:2], segment_ids, mask, num_segments=num_segments)

    def of_keys(a: Array) -> Array:
        """(B, T, H, 1 or K)."""
        return a if per_key else a[..., None]

    uncut, dtype = of_keys(a), q.dtype
    if packing is not None:
        q, k, v = (packing.filled(t) for t in (q, k, v))
        a = packing.transitions(a, reverse, axis_name)

    nothing = _zero_state(k, v, uncut, feature_map)
    initial, named = nothing, "(B, H, K, V)"
    if num_segments is not None:
        # Over blocks of time it is the same on all devices, as `nothing` is not.
        zeros = nothing if axis_name is None else jnp.zeros(nothing.shape, nothing.dtype)
        initial = jnp.repeat(zeros[:, None], num_segments, 1)
        named = "(B, N, H, K, V)"
        # y is rounded once, with what the states add.
        q, k, v = (x.astype(accumulation(dtype)) for x in (q, k, v))
    if initial_state is not None:
        given = jnp.asarray(initial_state)
        if given.shape != initial.shape:
            raise ValueError(
                f"{name}: initial_state must be {named} = {initial.shape}, got shape {given.shape}"
            )
        if given.dtype != initial.dtype:
            raise TypeError(
                f"{name}: initial_state must be {initial.dtype} as a is, got {given.dtype}"
            )
        initial = initial + given

    def run(state: Array) -> tuple[Array, Array]:
        return read_form(q, k, v, a, state, reverse, feature_map)

    state = initial if num_segments is None else nothing
    if axis_name is None:
        y, final = run(state)
    else:
        # The state that a state of ones becomes without inputs.
        none = jnp.zeros_like(of_keys(a).real)
        ones = 1 + _zero_state(none, none[..., :1], of_keys(a), "none")
        decay = read_form(none, none, none[..., :1], a, ones, reverse, "none")[1]
        y, final = run_over_axis(run, decay, state, axis_name, reverse)
    if packing is None:
        return y, final
    if num_segments is not None and q.shape[1] > 0:
        expand = functools.partial(features, feature_map=feature_map)
        options: Any = dict(reverse=reverse, axis_name=axis_name, packing=packing)
        y, final = add_states(y, q, k, v, uncut, initial, expand, **options)
    elif num_segments is not None:
        final = initial
    return packing.filled(y.astype(dtype)), final


def taylor_features(x: Array) -> Array:
    """(..., K) to 1, x_i, x_i²/√2, x_i x_j for j < i (arXiv 2312.04927, section 5.1)."""
    left, right = jnp.tril_indices(x.shape[-1], -1)
    parts = [
        1 + jnp.sum(x[..., :0], -1, keepdims=True),
        x,
        jnp.square(x) / 2**0.5,
        x[..., left] * x[..., right],
    ]
    return jnp.concatenate(parts, axis=-1)


def features(x: Array, feature_map: FeatureMap) -> Array:
    """In the accumulation type."""
    wide = x.astype(accumulation(x.dtype))
    return taylor_features(wide) if feature_map == "taylor" else wide


def _zero_state(k: Array, v: Array, a: Array, feature_map: FeatureMap) -> Array:
    """(B, H, K, V) in the dtype of a: a sum over no steps, so that it is sharded as they are."""
    keys, values, a = features(k[:, :0], feature_map), v[:, :0], a[:, :0]
    state = jnp.einsum("bthk,bthv->bhkv", keys, values.astype(keys.dtype))
    return state + jnp.sum(a, 1)[..., None]


def read(
    q: Array, k: Array, v: Array, a: Array, state: Array, reverse: bool, feature_map: FeatureMap
) -> tuple[Array, Array]:
    """a: (B, T, H) or (B, T, H, K)."""
    options: dict[str, Any] = dict(reverse=reverse, feature_map=feature_map)
    # vmap hides along which explicit axis the mapped one is sharded.
    meshes = [jax.typeof(x).sharding.mesh for x in (q, k, v, a, state)]
    if any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
        return _definition(q, k, v, a, state, **options)
    y, final = bind(heads.read_p, q, k, v, a, state, **options)
    return y, final


# Compiled once for each shape, outside of jax.jit too: lax.scan compiles each new body.
@functools.partial(jax.jit, static_argnames=("reverse", "feature_map"))
def _scan_blocks(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    state: Array,
    reverse: bool,
    feature_map: FeatureMap,
) -> tuple[Array, Array]:
    """a: (B, T, H, 1 or K). -> y (B, T, H, V), the state after the last step."""

    def read(state: Array, block: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, a = block
        return _read_block(q, k, v, a, state, reverse=reverse, feature_map=feature_map)

    # lax.scan prevents that its forward pass and the recomputation are merged.
    remade = jax.checkpoint(read, prevent_cse=False)
    state, y = lax.scan(remade, state, cut(q, k, v, a), reverse=reverse)
    return joined(y, q.shape[1]), state


def cut(q: Array, k: Array, v: Array, a: Array) -> tuple[Array, ...]:
    """Sequences (B, T, H, C) in blocks of a power of two of steps, (blocks, B, steps, H, C). A step
    of padding leaves the state as it is."""
    batch, time = q.shape[:2]
    steps = BLOCK
    if isinstance(time, int):  # else symbolic, in an exported program
        steps = min(BLOCK, 1 << max(time - 1, 0).bit_length())
    blocks = (time + steps - 1) // steps

    def cut_one(x: Array, padding: int) -> Array:
        widths = [(0, 0), (0, blocks * steps - time), (0, 0), (0, 0)]
        x = jnp.pad(x, widths, constant_values=padding)
        return jnp.moveaxis(x.reshape(batch, blocks, steps, *x.shape[2:]), 1, 0)

    return cut_one(q, 0), cut_one(k, 0), cut_one(v, 0), cut_one(a, 1)


def joined(y: Array, time: Any) -> Array:
    """Of cut()."""
    blocks, batch, steps, *rest = y.shape
    return jnp.moveaxis(y, 0, 1).reshape(batch, blocks * steps, *rest)[:, :time]


def _read_block(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    state: Array,
    *,
    reverse: bool,
    feature_map: FeatureMap,
) -> tuple[Array, Array]:
    """-> the state after a block of sequences (B, steps, H, ...), and y of it."""
    dtype = q.dtype

    def turn(x: Array) -> Array:
        """(B, steps, H, C) <-> (B, H, steps, C), the steps in the order of the scan."""
        return jnp.flip(x, -2) if reverse else x

    q, k, v, a = (turn(jnp.swapaxes(x, 1, 2)) for x in (q, k, v, a))
    q, k, v = features(q, feature_map), features(k, feature_map), v.astype(accumulation(dtype))
    y, up_to, after, all_steps = read_inside(q, k, v, a)
    # The one product that thousands of blocks repeat. First here, last in a gradient: see Exact.
    carried = all_steps.times(Exact.of(state))
    y = y + product("...tk,...kv->...tv", parts(q * up_to), parts(state, -2, conj=True))
    added = product("...sk,...sv->...kv", parts(k * after), v)
    if jnp.iscomplexobj(a):
        added = lax.complex(*jnp.split(added, 2, -2))
    return carried.value + (carried.low + added), jnp.swapaxes(turn(y), 1, 2).astype(dtype)


def decays_inside(a: Array) -> tuple[list[tuple[Array, Array]], Array, Array, Exact]:
    """-> of each span of 1, 2, 4 ... steps the products of a up to each step of the span, that
    included, and of those after it; the same two of the block, as a is; the product of all,
    (..., C, 1).

    a: (..., steps, C), the steps a power of two. A span of n steps is known; the next is of two.
    """
    up_to, after, all_steps = a, jnp.ones_like(a), Exact.of(a)
    spans: list[tuple[Array, Array]] = []
    while (span := 1 << len(spans)) < a.shape[-2]:
        spans.append((up_to, after))
        all_1, all_2 = (Exact(*x) for x in zip(*(_halves(x, 1) for x in all_steps), strict=True))
        up_to_1, up_to_2 = _halves(up_to, span)
        after_1, after_2 = _halves(after, span)
        after = _joined(after_1 * all_2.value, after_2)
        up_to = _joined(up_to_1, all_1.value * up_to_2)
        all_steps = Exact(*(x[..., 0, :] for x in all_1.times(all_2)))
    return spans, up_to, after, Exact(*(jnp.swapaxes(x, -1, -2) for x in all_steps))


def read_inside(q: Array, k: Array, v: Array, a: Array) -> tuple[Array, Array, Array, Exact]:
    """-> y of a block whose state before is zero; the last three of decays_inside().

    All (..., steps, C). The second half of a span of two reads the first. What is no number at a
    step reaches no step before it.
    """
    y = jnp.sum(q * k, -1, keepdims=True) * v
    spans, up_to, after, all_steps = decays_inside(a)
    for n, (to_step, after_step) in enumerate(spans):
        span = 1 << n
        y_1, y_2 = _halves(y, span)
        queries = parts(_halves(q, span)[1] * _halves(to_step, span)[1])
        keys = parts(_halves(k, span)[0] * _halves(after_step, span)[0], conj=True)
        scores = product("...tk,...sk->...ts", queries, keys)
        across = product("...ts,...sv->...tv", scores, _halves(v, span)[0])
        y = _joined(y_1, y_2 + across)
    return y, up_to, after, all_steps


def _halves(x: Array, span: int) -> tuple[Array, Array]:
    """(..., steps, C) -> two of (..., steps / (2 span), span, C)."""
    *lead, steps, width = x.shape
    x = x.reshape(*lead, steps // (2 * span), 2, span, width)
    return x[..., 0, :, :], x[..., 1, :, :]


def _joined(first: Array, second: Array) -> Array:
    """Of _halves."""
    *lead, spans, span, width = first.shape
    return jnp.stack([first, second], -3).reshape(*lead, spans * 2 * span, width)


# ---- The primitives ------------------------------------------------------------------------------


def _definition(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    state: Array,
    *,
    reverse: bool,
    feature_map: FeatureMap,
) -> tuple[Array, Array]:
    """Of sequences with any leading axes, which vmap adds."""
    if q.ndim > 4:
        f = functools.partial(_definition, reverse=reverse, feature_map=feature_map)
        results: tuple[Array, Array] = jax.vmap(f)(q, k, v, a, state)
        return results
    a = a if a.ndim == q.ndim else a[..., None]
    return _scan_blocks(q, k, v, a, state, reverse, feature_map)


def _kept_shape(
    q: Array, k: Array, v: Array, a: Array, state: Array
) -> tuple[tuple[Any, ...], Any]:
    """One state at the start of every so many steps, its parts apart; and their dtype."""
    steps = KEPT_STEPS_PER_KEY if a.ndim == q.ndim else KEPT_STEPS
    *lead, heads, keys, values = state.shape
    parts = 2 if jnp.iscomplexobj(a) else 1
    shape = (*lead, -(-q.shape[-3] // steps), heads, parts, keys, values)
    return shape, accumulation(q.dtype)


def _keep(*args: Array) -> Array:
    shape, dtype = _kept_shape(*args)
    return jnp.full(shape, unkept(dtype), dtype)


def _shardings(name: str, avals: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    """None: the definition computes where a mesh has explicit axes."""
    mesh = avals[0].sharding.mesh
    return [NamedSharding(mesh, PartitionSpec(*[None] * ndim)) for ndim in axes]


def _call(
    kernel: str, platform: str, ctx: Any, inputs: Any, operands: Any, options: dict[str, Any]
) -> Any:
    if is_partitioned(ctx):
        return None
    rule = jax.ffi.ffi_lowering(_library.target(kernel, platform, None))
    ctx = ctx.replace(avals_in=inputs)
    taylor = options["feature_map"] == "taylor"
    return rule(ctx, *operands, reverse=options["reverse"], taylor=taylor)


HEADS = Form(("reverse", "feature_map"), lambda _, args: args, _shardings, _call)


heads = read_primitives("gateloop_heads", "gate_loop", _definition, _kept_shape, _keep, HEADS)
