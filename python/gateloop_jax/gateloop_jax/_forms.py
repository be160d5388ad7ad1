"""Forms of gate_loop beside the scan, of heads: as surrogate attention (arXiv 2311.01927, section
3.3), and step by step. Their values and gradients are those of the scan.

Attention is in tiles of 64 steps. Decays inside a tile are products by halves (_wide_heads.py). A
pair of steps further apart has three factors: from the earlier step to its tile's end, over the
tiles between, and into the later one. None divides, and no logarithm is taken. So zeros are exact,
and where |a| <= 1 no factor is above 1. A backward pass computes a row of tiles again, or a block
of steps. Features of a map are computed of a tile or a step, never of all T.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from gateloop_jax._primitive import accumulation, parts, product
from gateloop_jax._wide_heads import (
    FeatureMap,
    Read,
    cut,
    decays_inside,
    features,
    joined,
    read,
    read_inside,
)


def attend(
    q: Array, k: Array, v: Array, a: Array, state: Array, reverse: bool, feature_map: FeatureMap
) -> tuple[Array, Array]:
    """T² work."""
    dtype, time = q.dtype, q.shape[1]

    def turn(x: Array) -> Array:
        return jnp.flip(x, 1) if reverse else x

    a = a if a.ndim == 4 else a[..., None]
    tiles = cut(*map(turn, (q, k, v, a)))
    q, k, v, a = (jnp.swapaxes(x, 2, 3) for x in tiles)  # (M, B, H, steps, C)
    v = v.astype(accumulation(dtype))
    _, _, after, all_steps = decays_inside(a)
    decay = jnp.swapaxes(all_steps.value, -1, -2)  # over a tile, (M, B, H, 1, C)
    count = jnp.arange(q.shape[0])
    others = (count, k, v, after, decay)

    def row(_: None, tile: tuple[Array, ...]) -> tuple[None, Array]:
        place, q, k, v, a = tile
        queries = features(q, feature_map)
        y, up_to, _after, _all_steps = read_inside(queries, features(k, feature_map), v, a)

        def reach(
            carry: tuple[Array, Array], tile: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], None]:
            other, keys, values, after, decay = tile

            def add(reached: Array, y: Array) -> tuple[Array, Array]:
                left = features(keys, feature_map) * after
                scores = product(
                    "...tk,...sk->...ts", parts(queries * reached), parts(left, conj=True)
                )
                return reached * decay, y + product("...ts,...sv->...tv", scores, values)

            return lax.cond(other < place, add, lambda *same: same, *carry), None

        # From the tile before this one to the first; `reached`: the decays from its end.
        remade = jax.checkpoint(reach, prevent_cse=False)
        (reached, y), _ = lax.scan(remade, (up_to, y), others, reverse=True)
        left = parts(queries * reached)
        return None, y + product("...tk,...kv->...tv", left, parts(state, -2, conj=True))

    def advance(state: Array, tile: tuple[Array, ...]) -> tuple[Array, None]:
        keys, values, after, decay = tile
        left = features(keys, feature_map) * after
        added = product("...sk,...sv->...kv", parts(left), values)
        if jnp.iscomplexobj(a):
            added = lax.complex(*jnp.split(added, 2, -2))
        return jnp.swapaxes(decay, -1, -2) * state + added, None

    _, y = lax.scan(jax.checkpoint(row, prevent_cse=False), None, (count, q, k, v, a))
    final, _ = lax.scan(jax.checkpoint(advance, prevent_cse=False), state, (k, v, after, decay))
    return turn(joined(jnp.swapaxes(y, 2, 3), time)).astype(dtype), final


def read_by_steps(
    q: Array, k: Array, v: Array, a: Array, state: Array, reverse: bool, feature_map: FeatureMap
) -> tuple[Array, Array]:
    """A backward pass has a state in memory for each block of steps, and one for each step of a
    block."""
    a = a if a.ndim == 4 else a[..., None]

    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, a = now
        written = (
            features(k, feature_map)[..., None] * v.astype(accumulation(v.dtype))[..., None, :]
        )
        state = a[..., None] * state + written
        y = product("...k,...kv->...v", features(q, feature_map), state.real)
        return state, y.astype(v.dtype)

    def block(state: Array, steps: tuple[Array, ...]) -> tuple[Array, Array]:
        by_step = tuple(jnp.moveaxis(x, 1, 0) for x in steps)
        state, y = lax.scan(step, state, by_step, reverse=reverse)
        return state, jnp.moveaxis(y, 0, 1)

    remade = jax.checkpoint(block, prevent_cse=False)
    state, y = lax.scan(remade, state, cut(q, k, v, a), reverse=reverse)
    return joined(y, q.shape[1]), state


FORMS: dict[str, Read] = {
    "auto": read,
    "scan": read,
    "attention": attend,
    "recurrent": read_by_steps,
}
