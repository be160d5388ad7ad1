"""States of the sequences in a row, (B, N, H, K, V), where heads are wider than one channel.

The read of a row is that of states of zeros. What states add to it, and what is left in them, are
products of a sequence's transitions times queries, keys and values. These are summed in blocks of
steps of one sequence. Of N sequences of T steps in all there are at most T / 64 + 2 N. No step has
a state in memory, a block has two: that before it, and its sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from gateloop_jax._linear_recurrence import carried
from gateloop_jax._packing import Packing, added_at, along, picked
from gateloop_jax._primitive import parts, product
from gateloop_jax._sharding import replicated
from gateloop_jax._time_sharding import AxisName, before_block

# Steps a block at most; powers of two down to the least where sequences are short.
MOST_STEPS, LEAST_STEPS = 64, 8


def add_states(
    y: Array,
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    states: Array,
    features: Callable[[Array], Array],
    *,
    reverse: bool,
    axis_name: AxisName | None,
    packing: Packing,
) -> tuple[Array, Array]:
    """y of `states` from y of zeros, and the final states.

    q, k: (B, T, H, C), of which features() makes the K keys. a: (B, T, H, 1 or K), before zeros are
    put where sequences begin. y, v: (B, T, H, V).
    """
    up_to, after = _products(a, reverse, axis_name, packing)
    ones = 1 + jnp.sum(states[..., : a.shape[3], :0], -1)
    left = packing.after_last(up_to, ones, reverse, axis_name)
    step, sequence, exists = _blocks(packing)

    def cut(x: Array) -> Array:
        """(B, T, H, C) -> (M, B, H, S, C), zero where there is no step."""
        return jnp.where(along(exists, x), picked(x, step), 0).transpose(1, 0, 3, 2, 4)

    def read(block: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, up_to, after, state = block
        queries, keys = parts(features(q) * up_to), parts(features(k) * after)
        added = product("...tk,...kv->...tv", queries, parts(state, -2, conj=True))
        sums = product("...tk,...tv->...kv", keys, v)
        return added, lax.complex(*jnp.split(sums, 2, -2)) if jnp.iscomplexobj(a) else sums

    before = jnp.moveaxis(picked(states, sequence), 1, 0)
    blocks = (*map(cut, (q, k, v, up_to, after)), before)
    # Block by block: of all at once the Taylor features would be too large.
    added, sums = lax.map(jax.checkpoint(read, prevent_cse=False), blocks)
    # Where there is no step queries are zero, and the state may not be finite.
    there = jnp.moveaxis(exists, 1, 0)[:, :, None, :, None]
    y = added_at(y, step, jnp.where(there, added, 0).transpose(1, 0, 3, 2, 4))
    total = added_at(jnp.zeros_like(states), sequence, jnp.moveaxis(sums, 0, 1))
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return y, left[..., None] * states + total


def _products(
    a: Array, reverse: bool, axis_name: AxisName | None, packing: Packing
) -> tuple[Array, Array]:
    """In the shape of a: of the transitions of a sequence up to each step, that included, and of
    those after it, zero in sequences whose final state is dropped."""
    flat = packing.filled(a, 1).reshape(*a.shape[:2], a.shape[2] * a.shape[3])
    nothing = jnp.zeros_like(flat[:, 0])
    begins = packing.begins(reverse, axis_name, first=True)
    ends = packing.begins(not reverse, axis_name, first=True)
    assert begins is not None and ends is not None
    begins, ends = along(begins, flat), along(ends, flat)
    last = packing.last_places(reverse, axis_name)
    none = jnp.full_like(last[:, :1], -1)
    is_last = picked(jnp.concatenate([last, none], 1), packing.rows())
    is_last = along(is_last == packing.places(reverse, axis_name), flat)

    up_to, _ = carried(
        jnp.where(begins, 0, flat), jnp.where(begins, flat, 0), nothing, reverse, axis_name
    )
    beyond = flat[:, :1] * 0  # of the last step, which ends a sequence
    if axis_name is not None:
        beyond = before_block(flat, axis_name, not reverse)[0][:, None]
    following = jnp.concatenate([beyond, flat[:, :-1]] if reverse else [flat[:, 1:], beyond], 1)
    after, _ = carried(
        jnp.where(ends, 0, following),
        jnp.where(is_last, jnp.ones_like(flat), 0),
        nothing,
        not reverse,
        axis_name,
    )
    return up_to.reshape(a.shape), after.reshape(a.shape)


def _blocks(packing: Packing) -> tuple[Array, Array, Array]:
    """-> M blocks, each of S steps of one sequence: the steps (B, M, S), the sequence (B, M), and
    where there is a step (B, M, S)."""
    rows, count = replicated(packing.rows()), packing.num_segments
    assert count is not None
    time = rows.shape[1]
    size = MOST_STEPS
    if isinstance(time, int):  # else symbolic, in an exported program
        size = min(max(1 << (time // count).bit_length(), LEAST_STEPS), MOST_STEPS)
    block, inside = jnp.arange(time // size + count), jnp.arange(size)

    def of_row(row: Array) -> tuple[Array, Array, Array]:
        order = jnp.argsort(row)
        begins = jnp.sum(row < jnp.arange(count + 1)[:, None], 1)
        blocks = jnp.cumsum(-(-jnp.diff(begins) // size))  # up to each sequence, that included
        sequence = jnp.minimum(jnp.searchsorted(blocks, block, side="right"), count - 1)
        before = jnp.concatenate([blocks[:1] * 0, blocks])[sequence]
        place = (begins[sequence] + (block - before) * size)[:, None] + inside
        exists = place < begins[sequence + 1][:, None]
        return order[jnp.minimum(place, time - 1)], sequence, exists

    step, sequence, exists = jax.vmap(of_row)(rows)
    return step, sequence, exists
