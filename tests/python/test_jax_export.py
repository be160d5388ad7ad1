"""jax.export of gateloop_jax: one program for every batch and length, with its vjp."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from gateloop_jax import linear_recurrence, polar_gate_loop, simple_gate_loop

# Custom calls are exported only when named here: JAX does not guarantee that they stay as they are.
CHECKS = [
    export.DisabledSafetyCheck.custom_call(f"gateloop_{name}{part}")
    for name in ("linear_recurrence", "polar_gate_loop", "simple_gate_loop")
    for part in ("", "_backward")
]


def shapes(function: Any, batch: Any, time: Any) -> list[jax.ShapeDtypeStruct]:
    width = 3
    if function is linear_recurrence:
        of = [((batch, time, width), "float32")] * 2 + [((batch, width), "float32")]
    elif function is simple_gate_loop:
        of = [((batch, time, width), "float32")] * 3 + [((batch, width), "float32")]
    else:
        of = [((batch, time, width), "float32")] * 3
        of += [((batch, time, 2 * width), "float32"), ((batch, width), "complex64")]
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in of]


@pytest.mark.parametrize("function", [linear_recurrence, polar_gate_loop, simple_gate_loop])
def test_symbolic_batch_and_time_with_a_vjp(function: Any) -> None:
    batch, time = export.symbolic_shape("b, t")
    exported = export.export(jax.jit(function), platforms=["cpu"], disabled_checks=CHECKS)(
        *shapes(function, batch, time)
    )
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    for sizes in ((2, 37), (1, 16)):
        keys = jax.random.split(jax.random.key(0), 5)
        given = [
            jax.random.normal(key, s.shape, s.dtype)
            for key, s in zip(keys, shapes(function, *sizes), strict=False)
        ]
        ours, back = jax.vjp(loaded.call, *given)
        expected, expected_back = jax.vjp(function, *given)
        pairs = zip(
            jax.tree.leaves((ours, back(ours))),
            jax.tree.leaves((expected, expected_back(expected))),
            strict=True,
        )
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)  # the same kernels


def test_without_the_switch_jax_says_which_call() -> None:
    with pytest.raises(ValueError, match="gateloop_linear_recurrence"):
        export.export(jax.jit(linear_recurrence))(*shapes(linear_recurrence, 2, 5))
