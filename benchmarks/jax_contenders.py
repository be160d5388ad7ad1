"""The operators in JAX: with its two scans, jitted, and with our kernels through gateloop_jax."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.contenders import Array, Contender, Pass, import_or_absent

Function = Callable[..., Any]
Scan = Callable[[Any, Any], Any]


def jax_modules() -> tuple[Any, Any]:
    return import_or_absent("jax"), import_or_absent("jax.numpy")


def passes(
    function: Function, arrays: Sequence[Array], gradient: Array, time_first: bool
) -> dict[str, Pass]:
    """Arrays are (B, T, ...), or laid out as (T, B, ...) beforehand for a scan over the first."""
    jax, jnp = jax_modules()

    def laid_out(x: Array) -> Any:
        return jnp.asarray(np.swapaxes(x, 0, 1).copy() if time_first else x)

    def as_given(x: Any) -> Array:
        return np.swapaxes(np.asarray(x), 0, 1) if time_first else np.asarray(x)

    @jax.jit  # type: ignore[untyped-decorator]
    def both(dy: Any, *inputs: Any) -> Any:
        y, pull_back = jax.vjp(function, *inputs)
        return y, *pull_back(dy)

    forward = jax.jit(function)
    inputs, dy = [laid_out(x) for x in arrays], laid_out(gradient)

    def run_forward() -> list[Any]:
        return [jax.block_until_ready(forward(*inputs))]

    def run_both() -> list[Any]:
        return list(jax.block_until_ready(both(dy, *inputs)))

    return {
        "forward": Pass(run_forward, lambda: [as_given(x) for x in run_forward()]),
        "forward + backward": Pass(run_both, lambda: [as_given(x) for x in run_both()]),
    }


def associative_scan(a: Any, x: Any) -> Any:
    jax, _ = jax_modules()

    def combine(left: Any, right: Any) -> Any:
        return right[0] * left[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (a, x), axis=1)[1]


def plain_scan(a: Any, x: Any) -> Any:
    """Over the first axis."""
    jax, jnp = jax_modules()

    def step(h: Any, inputs: Any) -> Any:
        h = inputs[0] * h + inputs[1]
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(x[0]), (a, x))[1]


def by_scan(operator: str, scan: Scan) -> Function:
    """The operator around a scan of a and x."""
    jax, jnp = jax_modules()

    def simple_gate_loop(q: Any, kv: Any, z: Any) -> Any:
        return q * scan(jax.nn.sigmoid(z), kv)

    def polar_gate_loop(q: Any, k: Any, v: Any, z: Any) -> Any:
        return q * scan(polar(z), (k * v).astype(jnp.complex64)).real

    functions: dict[str, Function] = {
        "linear_recurrence": scan,
        "simple_gate_loop": simple_gate_loop,
        "polar_gate_loop": polar_gate_loop,
    }
    return functions[operator]


def polar(z: Any) -> Any:
    """z: (..., 2) -> a complex (...)."""
    jax, jnp = jax_modules()
    raw = jax.lax.complex(z[..., 0], z[..., 1])
    magnitude = jnp.abs(raw)
    return raw * (jax.nn.sigmoid(magnitude) / magnitude)


def ours(operator: str) -> Function:
    package = import_or_absent("gateloop_jax")

    def polar_gate_loop(q: Any, k: Any, v: Any, z: Any) -> Any:
        return package.polar_gate_loop(q, k, v, z.reshape(*q.shape[:2], -1))[0]

    if operator == "polar_gate_loop":
        return polar_gate_loop
    return by_scan(operator, lambda a, x: package.linear_recurrence(a, x)[0])


def contenders(operator: str) -> list[Contender]:
    def scan_contender(name: str, scan: Scan, time_first: bool) -> Contender:
        def make(data: Any) -> dict[str, Pass]:
            return passes(by_scan(operator, scan), data.arrays, data.gradient, time_first)

        return Contender(name, "peer", "jax", make)

    def make_ours(data: Any) -> dict[str, Pass]:
        return passes(ours(operator), data.arrays, data.gradient, time_first=False)

    return [
        scan_contender("jax.lax.associative_scan", associative_scan, time_first=False),
        scan_contender("jax.lax.scan", plain_scan, time_first=True),
        Contender("gateloop_jax", "ours", "jax", make_ours),
    ]
