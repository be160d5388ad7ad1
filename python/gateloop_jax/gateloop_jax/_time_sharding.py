"""A recurrence, or a window, over time that a mesh axis shards, inside jax.shard_map.

Each device has a block of the steps: the first device of the axis the first, and so on. What a
block does to the state before it is h ↦ A h + X. The devices gather A and X, (B, D) each whatever T
is. Each then runs its block again from the state that follows. Of steps that a window reads, each
device gets those before its block. Derivatives are those of this program.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

# The name of a mesh axis, or names of several that shard time together.
AxisName = str | tuple[str, ...]
# From the state before a block: its outputs, and the state after it.
Run = Callable[[Array], tuple[Array, Array]]


def run_over_axis(
    run: Run, product: Array, initial_state: Array, axis_name: AxisName, reverse: bool
) -> tuple[Array, Array]:
    """-> the outputs of this block, and the state after the last, the same on every device.

    `product` of the block's transitions broadcasts to a state. The device of the first block that
    is read uses `initial_state`.
    """
    blocks = lax.axis_size(axis_name)
    place = place_of(axis_name, reverse)
    state = jnp.where(place == 0, initial_state, jnp.zeros_like(initial_state))
    _, after = run(state)
    products, afters = lax.all_gather((product, after), axis_name)
    carried = state
    for block in range(blocks - 1):
        rank = blocks - 1 - block if reverse else block
        carried = afters[rank] if block == 0 else products[rank] * carried + afters[rank]
        state = jnp.where(place == block + 1, carried, state)
    y, final = run(state)
    # Summed, it is the same number everywhere in the eyes of shard_map too.
    return y, lax.psum(jnp.where(place == blocks - 1, final, jnp.zeros_like(final)), axis_name)


def before_block(steps: Array, axis_name: AxisName, reverse: bool) -> tuple[Array, Array]:
    """Of steps (B, T, ...), T > 0: the last one that is read in the block before, (B, ...), and
    whether there is one, (); zeros without."""
    blocks = lax.axis_size(axis_name)
    onward = [(i, i - 1 if reverse else i + 1) for i in range(blocks)]
    last = steps[:, 0] if reverse else steps[:, -1]
    moves = [(a, b) for a, b in onward if 0 <= b < blocks]
    return lax.ppermute(last, axis_name, moves), place_of(axis_name, reverse) > 0


def steps_before(steps: Array, count: int, axis_name: AxisName) -> Array:
    """Of steps (..., T, d): the last `count` before this block, (..., count, d); zeros where there
    are none. Each block that holds some of them sends those, and no more."""
    blocks, time = lax.axis_size(axis_name), steps.shape[-2]
    parts: list[Array] = []
    missing = count
    for distance in range(1, blocks):
        sent = min(time, missing)
        if sent == 0:
            break
        moves = [(i, i + distance) for i in range(blocks - distance)]
        parts.insert(0, lax.ppermute(steps[..., time - sent :, :], axis_name, moves))
        missing -= sent
    nothing = jnp.zeros((*steps.shape[:-2], missing, steps.shape[-1]), steps.dtype)
    return jnp.concatenate([nothing, *parts], axis=-2)


def largest_before(x: Array, axis_name: AxisName) -> Array:
    """Of x (B), no number below zero: the largest in the blocks before, (B); 0 without."""
    everywhere = lax.all_gather(x, axis_name)  # (blocks, B)
    before = jnp.arange(everywhere.shape[0]) < lax.axis_index(axis_name)
    return jnp.max(jnp.where(before[:, None], everywhere, 0), axis=0)


def place_of(axis_name: AxisName, reverse: bool) -> Array:
    """Of this device's block in the order in which blocks are read."""
    index = lax.axis_index(axis_name)
    return lax.axis_size(axis_name) - 1 - index if reverse else index
