"""The simplified, real GateLoop: the function, and a block of its own.

Gate, recurrence and read-out are one kernel, as of polar_gate_loop.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random
from jax.typing import ArrayLike

from gateloop_jax import _checks
from gateloop_jax._blocks import LayerNorm, Mixer, NoNorm, Norm, Recipe, layer_norm
from gateloop_jax._linear_recurrence import carried
from gateloop_jax._packing import Packing
from gateloop_jax._primitive import (
    accumulation,
    bind,
    keep,
    kept_shape,
    one_program,
    read_primitives,
)
from gateloop_jax._time_sharding import AxisName, run_over_axis
from gateloop_jax._weights import Weight, own, within


@one_program
def simple_gate_loop(
    q: ArrayLike,
    kv: ArrayLike,
    z: ArrayLike,
    initial_state: ArrayLike | None = None,
    reverse: bool = False,
    normalize_input: bool = False,
    *,
    segment_ids: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    num_segments: int | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Array, Array]:
    """h_t = σ(z_t) h_{t-1} + x_t, y_t = q_t h_t; with `reverse` from the last step on.

    q, kv, z:      (B, T, D), one dtype: float32, float64, bfloat16 or float16.
    initial_state: (B, D), float32 (float64 for float64).
    normalize_input: x_t = (1 - σ(z_t)) kv_t instead of kv_t.
    segment_ids, mask, num_segments, axis_name: as linear_recurrence takes them; the output at
                   padding is zero.
    Returns (y (B, T, D) in the dtype of q, final_state (B, D)).
    Raises TypeError or ValueError naming the argument, what was expected and what came.
    """
    name = "simple_gate_loop"
    q = _checks.sequence(name, "q", q, _checks.REAL)
    kv, z = _checks.like(name, "kv", kv, "q", q), _checks.like(name, "z", z, "q", q)
    packing = Packing.of(name, q.shape[:2], segment_ids, mask, num_segments=num_segments)
    initial = _checks.state(name, initial_state, q, segments=num_segments)
    if packing is not None:
        q, kv, z = (packing.filled(t) for t in (q, kv, z))
        if packing.segment_ids is None:
            z = packing.filled(z, 8192)  # σ(z) is 1 in every format
    if normalize_input or (packing is not None and packing.segment_ids is not None):
        options = (bool(normalize_input), axis_name, packing)
        return _read(q, kv, z, initial, bool(reverse), *options)

    def run(state: Array, *inputs: Array) -> tuple[Array, Array]:
        y, final_state = bind(simple.read_p, *(inputs or (q, kv)), z, state, reverse=bool(reverse))
        return y, final_state

    if axis_name is None:
        return run(initial)
    zeros = jnp.zeros_like(q)
    product = run(jnp.ones_like(initial), zeros, zeros)[1]
    return run_over_axis(run, product, initial, axis_name, bool(reverse))


def _read(
    q: Array,
    kv: Array,
    z: Array,
    initial: Array,
    reverse: bool,
    normalize_input: bool = False,
    axis_name: AxisName | None = None,
    packing: Packing | None = None,
) -> tuple[Array, Array]:
    wide = accumulation(q.dtype)
    a, x = jax.nn.sigmoid(z.astype(wide)), kv.astype(wide)
    if normalize_input:
        x = jax.nn.sigmoid(-z.astype(wide)) * x
    h, final_state = carried(a, x, initial, reverse, axis_name, packing)
    return (q.astype(wide) * h).astype(q.dtype), final_state


def _definition(
    q: Array, kv: Array, z: Array, initial: Array, *, reverse: bool
) -> tuple[Array, Array]:
    return _read(q, kv, z, initial, reverse)


simple = read_primitives(
    "gateloop_simple", "simple_gate_loop", _definition, kept_shape, keep, count=4
)


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
        given = {} if packing is None else packing._asdict()
        y, state = simple_gate_loop(x @ self.wq, x @ self.wkv, x @ self.wz, state, **given)
        return y if self.post_ln is None else self.post_ln(y), state
