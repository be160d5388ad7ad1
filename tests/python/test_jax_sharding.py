"""gateloop_jax on sharded arrays: computed where they lie, in both kinds of mesh."""

from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_no_collective
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gateloop_jax import gate_loop, linear_recurrence, polar_gate_loop, simple_gate_loop

Function = Callable[..., Any]
SHAPE = (4, 37, 6)


def arguments(function: Function) -> list[Array]:
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*shape: int, dtype: Any = "float32") -> Array:
        return jax.random.normal(next(keys), shape, dtype)

    batch, time, channels = SHAPE
    if function is linear_recurrence:
        return [0.5 * normal(*SHAPE), normal(*SHAPE), normal(batch, channels)]
    if function is simple_gate_loop:
        return [*(normal(*SHAPE) for _ in range(3)), normal(batch, channels)]
    state = normal(batch, channels, dtype="complex64")
    if function is gate_loop:
        return [*(normal(*SHAPE) for _ in "qkv"), 0.5 * normal(*SHAPE, dtype="complex64"), state]
    return [*(normal(*SHAPE) for _ in "qkv"), normal(batch, time, 2 * channels), state]


def forward(function: Function, given: list[Array]) -> Any:
    return function(*given)


def reverse_mode(function: Function, given: list[Array]) -> Any:
    outputs, back = jax.vjp(function, *given)
    return outputs, back(outputs)


def forward_mode(function: Function, given: list[Array]) -> Any:
    return jax.jvp(function, given, given)


def mapped(function: Function, given: list[Array]) -> Any:
    """Along the batch, so that the primitives get one more axis."""
    one = [x[:, None] for x in given]
    return jax.vmap(function)(*one)


def on_mesh(kind: AxisType, axes: str, given: list[Array]) -> list[Array]:
    """Sharded in two along batch or channels."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    batch, channels = ("x", None) if axes == "batch" else (None, "x")
    return [
        jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(batch, *[None] * (x.ndim - 2), channels))
        )
        for x in given
    ]


FUNCTIONS = [linear_recurrence, gate_loop, polar_gate_loop, simple_gate_loop]
each_function = pytest.mark.parametrize("function", FUNCTIONS)
each_kind = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


@each_function
@each_kind
@pytest.mark.parametrize("axes", ["batch", "channels"])
@pytest.mark.parametrize("mode", [forward, reverse_mode, forward_mode, mapped])
def test_sharded_arrays_stay_where_they_are(
    function: Function, kind: AxisType, axes: str, mode: Function
) -> None:
    given = arguments(function)
    sharded = on_mesh(kind, axes, given)
    program = jax.jit(lambda *args: mode(function, list(args))).lower(*sharded).compile()
    assert_no_collective(program)
    expected = jax.jit(lambda *args: mode(function, list(args)))(*given)
    for ours, alone in zip(
        jax.tree.leaves(program(*sharded)), jax.tree.leaves(expected), strict=True
    ):
        assert not ours.sharding.is_fully_replicated
        # Channels are independent: the kernel does the same sums. XLA may fuse what is around them.
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)


@each_function
@each_kind
def test_without_a_state(function: Function, kind: AxisType) -> None:
    given = arguments(function)[:-1]
    y, state = jax.jit(function)(*on_mesh(kind, "channels", given))
    assert not y.sharding.is_fully_replicated and not state.sharding.is_fully_replicated
    for ours, alone in zip((y, state), function(*given), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)


def heads_of(q: Array, k: Array, v: Array, a: Array, **options: Any) -> Any:
    """gate_loop of one head for every two channels."""
    q_, k_, v_ = (x.reshape(*x.shape[:2], -1, 2) for x in (q, k, v))
    y, state = gate_loop(q_, k_, v_, a[..., ::2], **options)
    return y.reshape(q.shape), state


@pytest.mark.parametrize(
    ("function", "packed"),
    [
        *product([linear_recurrence, gate_loop, polar_gate_loop], [False, True]),
        (heads_of, False),
        pytest.param(heads_of, True, marks=pytest.mark.long),
    ],
)
def test_explicit_axes_without_jit(function: Function, packed: bool) -> None:
    given = arguments(gate_loop if function is heads_of else function)[:-1]
    options = dict(segment_ids=np.zeros(SHAPE[:2], int)) if packed else {}

    def results(*given: Array) -> Any:
        y, back = jax.vjp(lambda *x: function(*x, **options)[0], *given)
        return y, back(y)

    for ours, alone in zip(
        jax.tree.leaves(results(*on_mesh(AxisType.Explicit, "batch", given))),
        jax.tree.leaves(jax.jit(results)(*given)),
        strict=True,
    ):
        assert not ours.sharding.is_fully_replicated
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [linear_recurrence, polar_gate_loop])
def test_time_on_automatic_axes_is_gathered_alone(function: Function) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    given = arguments(function)
    *sequences, state = [jnp.pad(x, [(0, 0), (0, 1), (0, 0)]) for x in given[:-1]] + [given[-1]]
    by_time = NamedSharding(mesh, PartitionSpec(None, "x"))
    sharded = [jax.device_put(x, by_time) for x in sequences]
    for ours, alone in zip(
        jax.jit(function)(*sharded, state), function(*sequences, state), strict=True
    ):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)


def test_time_on_explicit_axes_is_an_error() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((2, 4, 6)), NamedSharding(mesh, PartitionSpec(None, "x")))
    with pytest.raises(ValueError, match=r"recurrence: time must not be sharded, got .*\[2,4@x,6"):
        jax.jit(linear_recurrence)(x, x)


def test_different_explicit_shardings_are_an_error() -> None:
    mesh = jax.make_mesh((2, 1), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    a, x = (
        jax.device_put(jnp.ones(SHAPE), NamedSharding(mesh, PartitionSpec(None, None, axis)))
        for axis in "xy"
    )
    with pytest.raises(ValueError, match="sharded alike, got 'x' and 'y' along channels"):
        jax.jit(linear_recurrence)(a, x)
