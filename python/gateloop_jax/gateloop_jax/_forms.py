"""Forms of gate_loop beside the scan, of heads: as surrogate attention (arXiv 2311.01927, section
3.3), and step by step. Their values and gradients are those of the scan.

Attention is in tiles of 64 steps. Decays inside a tile are products by halves (_wide_heads.py). A
pair of steps further apart has three factors: from the earlier step to its tile's end, over the
tiles between, and into the later one. None divides, and no logarithm is taken. So zeros are exact,
and where |a| <= 1 no factor is above 1. A backward pass computes a row of tiles again.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from gateloop_jax._primitive import accumulation, parts, product
from gateloop_jax._wide_heads import FeatureMap, Read, cut, features, joined, read, read_inside


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
    q, k, v = features(q, feature_map), features(k, feature_map), v.astype(accumulation(dtype))
    inside, up_to, after, all_steps = read_inside(q, k, v, a)
    decay = jnp.swapaxes(all_steps.value, -1, -2)  # over a tile, (M, B, H, 1, C)
    keys = k * after
    count = jnp.arange(q.shape[0])

    def row(_: None, tile: tuple[Array, ...]) -> tuple[None, Array]:
        place, queries, y = tile

        def reach(
            carry: tuple[Array, Array], tile: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], None]:
            other, keys, values, decay = tile

            def add(reached: Array, y: Array) -> tuple[Array, Array]:
                scores = product("...tk,...sk->...ts", parts(reached), parts(keys, conj=True))
                return reached * decay, y + product("...ts,...sv->...tv", scores, values)

            return lax.cond(other < place, add, lambda *same: same, *carry), None

        # From the tile before this one to the first; the queries reach its end.
        remade = jax.checkpoint(reach, prevent_cse=False)
        (reached, y), _ = lax.scan(remade, (queries, y), (count, keys, v, decay), reverse=True)
        return None, y + product("...tk,...kv->...tv", parts(reached), parts(state, -2, conj=True))

    def advance(state: Array, tile: tuple[Array, ...]) -> tuple[Array, None]:
        keys, values, decay = tile
        added = product("...sk,...sv->...kv", parts(keys), values)
        if jnp.iscomplexobj(a):
            added = lax.complex(*jnp.split(added, 2, -2))
        return jnp.swapaxes(decay, -1, -2) * state + added, None

    _, y = lax.scan(jax.checkpoint(row, prevent_cse=False), None, (count, q * up_to, inside))
    final, _ = lax.scan(advance, state, (keys, v, decay))
    return turn(joined(jnp.swapaxes(y, 2, 3), time)).astype(dtype), final


def read_by_steps(
    q: Array, k: Array, v: Array, a: Array, state: Array, reverse: bool, feature_map: FeatureMap
) -> tuple[Array, Array]:
    """A backward pass has T states in memory."""
    a = a if a.ndim == 4 else a[..., None]

    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, a = now
        written = (
            features(k, feature_map)[..., None] * v.astype(accumulation(v.dtype))[..., None, :]
        )
        state = a[..., None] * state + written
        y = product("...k,...kv->...v", features(q, feature_map), state.real)
        return state, y.astype(v.dtype)

    steps = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, a))
    state, y = lax.scan(step, state, steps, reverse=reverse)
    return jnp.moveaxis(y, 0, 1), state


FORMS: dict[str, Read] = {
    "auto": read,
    "scan": read,
    "attention": attend,
    "recurrent": read_by_steps,
}
