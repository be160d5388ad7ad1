"""The simplified, real GateLoop as a block of its own."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

from gateloop_jax._blocks import LayerNorm, Mixer, NoNorm, Norm, Recipe, layer_norm
from gateloop_jax._linear_recurrence import linear_recurrence
from gateloop_jax._packing import Packing
from gateloop_jax._primitive import accumulation
from gateloop_jax._weights import Weight, own, within


class SimpleGateLoop(Mixer):
    """h_t = σ(z_t) h_{t-1} + kv_t, y_t = q_t h_t, then a LayerNorm if there is one."""

    norm: Norm
    wq: Array  # (D, D), as wkv and wz
    wkv: Array
    wz: Array
    post_ln: LayerNorm | None

    @staticmethod
    def make(recipe: Recipe, key: Array, *, prenorm: bool, post_ln: bool) -> "SimpleGateLoop":
        """The fields of SimpleGateLoopSpec in include/gateloop/model.h."""
        dim = recipe.dim
        q, kv, z = (recipe.matrix(k, dim, dim) for k in random.split(key, 3))
        return SimpleGateLoop(
            norm=recipe.rms_norm() if prenorm else NoNorm(),
            wq=q,
            wkv=kv,
            wz=z,
            post_ln=layer_norm(dim) if post_ln else None,
        )

    def weights(self) -> Iterator[Weight]:
        yield from within("2.norm.", ("norm",), self.norm)
        yield from own(self, "2.to_qkva.0.weight", "wq", "wkv", "wz")
        yield from within("2.maybe_post_ln.", ("post_ln",), self.post_ln)

    def make_state(self, batch: int, dtype: Any, length: int | None) -> Array:
        """(B, D), real."""
        return jnp.zeros((batch, self.wq.shape[1]), accumulation(dtype))

    def mix(
        self, x: Array, state: Array | None, packing: Packing | None = None
    ) -> tuple[Array, Array]:
        q, kv, z = x @ self.wq, x @ self.wkv, x @ self.wz
        wide = accumulation(q.dtype)
        given = {} if packing is None else packing._asdict()
        a = jax.nn.sigmoid(z.astype(wide))
        h, state = linear_recurrence(a, kv.astype(wide), state, **given)
        y = (q.astype(wide) * h).astype(q.dtype)
        return y if self.post_ln is None else self.post_ln(y), state
