"""gateloop_jax's kernels on a CUDA device against those of the CPU. Skipped where there is none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from channels import assert_near, sizes
from jax import Array, lax

from gateloop_jax import _library, linear_recurrence, polar_gate_loop, simple_gate_loop

Function = Callable[..., tuple[Array, Array]]


@pytest.fixture(autouse=True, scope="module")
def cuda() -> jax.Device:
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX has no CUDA device: {error}")
    assert "cuda" in _library.platforms("linear_recurrence"), (
        f"{_library.path()} was built without nvcc"
    )
    return device


def arguments(
    function: Function, dtype: str, time: int, batch: int = 2, channels: int = 37
) -> list[Array]:
    """Sequences, then the state. Moduli up to one, so that early steps count at the last."""
    keys = iter(jax.random.split(jax.random.key(time), 6))
    with jax.default_device(jax.devices("cpu")[0]):
        wide = jnp.promote_types(dtype, "float32")
        state_type = jnp.promote_types(wide, "complex64") if function is polar_gate_loop else wide

        def normal(width: int) -> Array:
            return jax.random.normal(next(keys), (batch, time, width), wide)

        state = jax.random.normal(next(keys), (batch, channels), state_type)
        if function is polar_gate_loop:
            sequences = [*(normal(channels) for _ in "qkv"), normal(2 * channels)]
        elif function is simple_gate_loop:
            sequences = [normal(channels) for _ in "qvz"]
        else:
            a = normal(channels)
            sequences = [a / jnp.abs(a) * jax.nn.sigmoid(2 + jnp.abs(a)), normal(channels)]
        return [*(s.astype(dtype) for s in sequences), state]


@partial(jax.jit, static_argnums=0)
def values_and_gradients(f: Function, given: list[Array]) -> Any:
    """With cotangents that tell steps and channels apart, and are the same on both devices."""
    outputs, back = jax.vjp(f, *given)
    return outputs, back(
        jax.tree.map(
            lambda y: jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype), outputs
        )
    )


def on_both(f: Callable[..., Any], given: list[Array]) -> tuple[Any, Any]:
    results = [f(jax.device_put(given, jax.devices(platform)[0])) for platform in ("cuda", "cpu")]
    assert {d.platform for x in jax.tree.leaves(results[0]) for d in x.devices()} == {"gpu"}
    return results[0], results[1]


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Of each channel: sums over hundreds of steps cancel."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        # A channel of few numbers, as of a state, may have cancelled.
        assert_near(one, other, tolerance, least=float(sizes(other).max()) / 16)


# A rounding of float32 is 6e-8, and some hundreds of steps count. One of bfloat16 is 4e-3. A
# gradient of transitions has two, and the two devices may round to different neighbours.
TOLERANCE = {"float32": 2e-5, "complex64": 2e-5, "bfloat16": 3e-2}
CASES = [
    (linear_recurrence, "float32"),
    (linear_recurrence, "complex64"),
    (linear_recurrence, "bfloat16"),
    (polar_gate_loop, "float32"),
    (polar_gate_loop, "bfloat16"),
    (simple_gate_loop, "float32"),
    (simple_gate_loop, "bfloat16"),
]
each_case = pytest.mark.parametrize(("function", "dtype"), CASES)


# One step, less than a chunk, and several chunks, which take scratch.
@pytest.mark.parametrize("time", [1, 37, 1000])
@pytest.mark.parametrize("reverse", [False, True])
@each_case
def test_values_and_gradients(function: Function, dtype: str, reverse: bool, time: int) -> None:
    f = partial(values_and_gradients, partial(function, reverse=reverse))
    assert_close(*on_both(f, arguments(function, dtype, time)), TOLERANCE[dtype])


@each_case
def test_the_kernels_run(cuda: jax.Device, function: Function, dtype: str) -> None:
    given = jax.device_put(arguments(function, dtype, 37), cuda)
    program = str(values_and_gradients.lower(function, given).compile().as_text())
    name = function.__name__
    for part in ("", "_backward"):
        assert f'custom_call_target="gateloop_{name}{part}"' in program


@pytest.mark.parametrize("function", [linear_recurrence, polar_gate_loop, simple_gate_loop])
def test_vmap(function: Function) -> None:
    given = [jnp.stack([x, -x]) for x in arguments(function, "float32", 300)]
    assert_close(*on_both(jax.jit(lambda xs: jax.vmap(function)(*xs)), given), 2e-5)


@pytest.mark.parametrize("function", [linear_recurrence, polar_gate_loop, simple_gate_loop])
@pytest.mark.parametrize("steps", [1, 300])
def test_scan_carries_the_state(function: Function, steps: int) -> None:
    """The same program again and again, at one step as part of a CUDA graph."""

    @jax.jit
    def in_pieces(given: list[Array]) -> Any:
        *sequences, state = given
        cut = [jnp.stack(jnp.split(s, s.shape[1] // steps, axis=1)) for s in sequences]
        return lax.scan(lambda h, parts: function(*parts, h)[::-1], state, cut)

    given = arguments(function, "float32", 6 * steps)
    for _ in range(4):
        assert_close(*on_both(in_pieces, given), 2e-5)
        given = [*given[:-1], given[-1] + 1]


def test_the_same_bits_again() -> None:
    given = jax.device_put(arguments(polar_gate_loop, "float32", 1000), jax.devices("cuda")[0])
    first, second = (values_and_gradients(polar_gate_loop, given) for _ in range(2))
    assert_close(first, second, 0)


def test_nothing_in_nothing_out() -> None:
    for shape in ((2, 0, 3), (0, 5, 3), (2, 5, 0)):
        batch, time, channels = shape
        given = arguments(linear_recurrence, "float32", time, batch, channels)
        assert_close(*on_both(partial(values_and_gradients, linear_recurrence), given), 1e-6)
