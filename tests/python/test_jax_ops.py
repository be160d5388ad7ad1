"""gateloop_jax's functions: values, derivatives, transformations, precision, errors."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from gateloop_jax import (
    gate_loop,
    linear_recurrence,
    polar_gate,
    polar_gate_loop,
    simple_gate_loop,
)

Outputs = tuple[Array, Array]
Function = Callable[..., Outputs]


def combine(first: Outputs, then: Outputs) -> Outputs:
    return then[0] * first[0], then[0] * first[1] + then[1]


def scan(a: Array, x: Array, state: Array, reverse: bool = False) -> Outputs:
    """The recurrence by lax.associative_scan."""
    first = -1 if reverse else 0
    x = x.at[:, first].add(a[:, first] * state)
    h = lax.associative_scan(combine, (a, x), axis=1, reverse=reverse)[1]
    return h, h[:, -1 - first]


def gate_by_scan(q: Array, k: Array, v: Array, a: Array, state: Array, reverse: bool) -> Outputs:
    h, final = scan(a, (k * v).astype(a.dtype), state, reverse)
    return q * h.real, final


def polar_by_scan(q: Array, k: Array, v: Array, z: Array, state: Array, reverse: bool) -> Outputs:
    raw = lax.complex(z[..., 0::2], z[..., 1::2])
    a = jax.nn.sigmoid(jnp.abs(raw)) * jnp.exp(1j * jnp.angle(raw))
    return gate_by_scan(q, k, v, a, state, reverse)


def simple_by_scan(q: Array, kv: Array, z: Array, state: Array, reverse: bool) -> Outputs:
    h, final = scan(jax.nn.sigmoid(z), kv, state, reverse)
    return q * h, final


class Case:
    """A function of ours, its definition, and how to make arguments."""

    def __init__(self, name: str, ours: Function, theirs: Function, dtype: str, reverse: bool):
        self.name = f"{name}-{dtype}" + "-reverse" * reverse
        self.ours = partial(ours, reverse=reverse)
        self.theirs = partial(theirs, reverse=reverse)
        self.function, self.dtype = ours, jnp.dtype(dtype)

    def arguments(self, batch: int, time: int, channels: int, wide: bool = True) -> list[Array]:
        """Sequences, then the state. Moduli up to one, so that early steps count at the last."""
        keys = iter(jax.random.split(jax.random.key(1), 6))
        real = jnp.dtype("float64" if wide else "float32")
        complex_ = jnp.promote_types(real, "complex64")
        dtype = complex_ if self.dtype.kind == "c" else real

        def normal(width: int, dtype: Any) -> Array:
            return jax.random.normal(next(keys), (batch, time, width), dtype)

        a = normal(channels, dtype)
        a = a / jnp.abs(a) * jax.nn.sigmoid(2 + jnp.abs(a))
        state = jax.random.normal(next(keys), (batch, channels), dtype)
        if self.function is linear_recurrence:
            return [a, normal(channels, dtype), state]
        if self.function is simple_gate_loop:
            return [*(normal(channels, real) for _ in "qvz"), state]
        last = normal(2 * channels, real) if self.function is polar_gate_loop else a
        return [*(normal(channels, real) for _ in "qkv"), last, state]


CASES = [
    Case("linear", linear_recurrence, scan, "float64", False),
    Case("linear", linear_recurrence, scan, "complex128", False),
    Case("gate", gate_loop, gate_by_scan, "float64", False),
    Case("gate", gate_loop, gate_by_scan, "complex128", False),
    Case("polar", polar_gate_loop, polar_by_scan, "complex128", False),
    Case("simple", simple_gate_loop, simple_by_scan, "float64", False),
    # gate_loop is linear_recurrence between two elementwise passes.
    Case("linear", linear_recurrence, scan, "complex128", True),
    Case("polar", polar_gate_loop, polar_by_scan, "complex128", True),
    Case("simple", simple_gate_loop, simple_by_scan, "float64", True),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
REAL, COMPLEX, POLAR, SIMPLE = CASES[0], CASES[1], CASES[4], CASES[5]
KERNELS = [REAL, COMPLEX, POLAR, SIMPLE]
kernel_cases = pytest.mark.parametrize("case", KERNELS, ids=lambda c: c.name)
forward_cases = pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.name)


def assert_all_close(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@partial(jax.jit, static_argnums=0)
def values_and_gradients(f: Function, arguments: list[Array]) -> Any:
    """With cotangents that tell steps and channels apart."""
    outputs, back = jax.vjp(f, *arguments)
    return outputs, back(
        jax.tree.map(lambda y: y + jnp.arange(y.shape[-1], dtype=y.dtype), outputs)
    )


# ---- Values and derivatives ----------------------------------------------------------------------


# 37 steps: two whole checkpoint blocks of 16 and a bit.
@each_case
def test_equals_associative_scan(x64: None, case: Case) -> None:
    arguments = case.arguments(2, 37, 5)
    # Double precision rounds at 1e-16; sums of 37 numbers of order 10, in another order.
    assert_all_close(
        values_and_gradients(case.ours, arguments),
        values_and_gradients(case.theirs, arguments),
        1e-12,
    )


@kernel_cases
def test_equals_associative_scan_in_float32(case: Case) -> None:
    arguments = case.arguments(2, 37, 17, wide=False)
    # 6e-8 a rounding, some tens of them, values and gradients of order 100.
    assert_all_close(
        values_and_gradients(case.ours, arguments),
        values_and_gradients(case.theirs, arguments),
        1e-4,
    )


@each_case
def test_numerical_derivatives(x64: None, case: Case) -> None:
    order = 2 if case.function is linear_recurrence else 1
    check_grads(jax.jit(case.ours), case.arguments(2, 4, 2), order=order, modes=["fwd", "rev"])


@pytest.mark.parametrize("case", [POLAR, SIMPLE], ids=lambda case: case.name)
def test_second_derivatives_of_the_fused_gates(x64: None, case: Case) -> None:
    check_grads(jax.jit(case.ours), case.arguments(1, 3, 1), order=2, modes=["rev"])


@pytest.mark.parametrize("case", [REAL, POLAR, SIMPLE], ids=lambda case: case.name)
def test_linear_transpose(x64: None, case: Case) -> None:
    """In the input and the state."""
    *sequences, state = case.arguments(2, 7, 3)
    place = {"linear": 1, "polar": 2, "simple": 1}[case.name.split("-")[0]]

    def f(x: Array, state: Array) -> Outputs:
        return case.ours(*sequences[:place], x, *sequences[place + 1 :], state)

    outputs, back = jax.vjp(f, sequences[place], state)
    transposed = jax.linear_transpose(f, sequences[place], state)(outputs)
    assert_all_close(list(transposed), list(back(outputs)), 1e-12)


@pytest.mark.parametrize("time", [1, 15, 16, 17, 4096 + 1])
def test_lengths(x64: None, time: int) -> None:
    """By lax.scan: lax.associative_scan compiles a program for every length."""

    def step(state: Array, parts: Outputs) -> Outputs:
        state = parts[0] * state + parts[1]
        return state, state

    for case in (REAL, COMPLEX):
        a, x, state = case.arguments(1, time, 3)
        final, h = lax.scan(step, state, (a.swapaxes(0, 1), x.swapaxes(0, 1)))
        assert_all_close(case.ours(a, x, state), (h.swapaxes(0, 1), final), 1e-11)
    q, k, v, z, state = POLAR.arguments(1, time, 3)
    assert_all_close(
        polar_gate_loop(q, k, v, z, state), gate_loop(q, k, v, polar_gate(z), state), 1e-11
    )
    one, (q, kv, z, state) = jnp.ones_like(q), SIMPLE.arguments(1, time, 3)
    assert_all_close(
        simple_gate_loop(q, kv, z, state),
        gate_loop(q, one, kv, jax.nn.sigmoid(z), state),
        1e-11,
    )


@each_case
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0)], ids=["T", "B", "D"])
def test_nothing_in_nothing_out(case: Case, shape: tuple[int, int, int]) -> None:
    arguments = case.arguments(*shape, wide=False)
    y, final = case.ours(*arguments)
    assert y.shape == shape
    np.testing.assert_array_equal(final, arguments[-1] if shape[1] == 0 else final)
    given = values_and_gradients(case.ours, arguments)[1]
    assert [g.shape for g in given] == [x.shape for x in arguments]


def test_no_state_is_a_state_of_zeros() -> None:
    a, x, state = REAL.arguments(2, 5, 3, wide=False)
    assert_all_close(linear_recurrence(a, x), linear_recurrence(a, x, 0 * state), 0)


def test_gate_at_zero() -> None:
    z = jnp.zeros((1, 2, 2)).at[0, 1, 0].set(1.0)
    np.testing.assert_allclose(polar_gate(z)[0, :, 0], [0.5, 1 / (1 + np.exp(-1))], rtol=1e-6)
    one = jnp.ones((1, 2, 1))
    fused = jax.grad(lambda z: polar_gate_loop(one, one, one, z)[0].sum())(z)
    apart = jax.grad(lambda z: gate_loop(one, one, one, polar_gate(z))[0].sum())(z)
    np.testing.assert_array_equal(fused[0, 0], [0, 0])
    np.testing.assert_array_equal(apart[0, 0], [0, 0])
    assert_all_close(fused, apart, 1e-6)


# ---- Storage in half precision -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "function", [linear_recurrence, gate_loop, polar_gate_loop, simple_gate_loop]
)
def test_half_precision_is_storage_only(x64: None, function: Function, dtype: str) -> None:
    case = next(c for c in CASES if c.function is function)
    *sequences, state = case.arguments(2, 100, 5)
    stored = [s.astype(dtype) for s in sequences]
    if function is gate_loop:
        stored[3] = stored[3].astype("float32")
    state = state.astype("complex64" if function is polar_gate_loop else "float32")
    y, final = function(*stored, state)
    wide = [s.astype("float64") for s in stored]
    exact_y, exact_final = jax.jit(case.theirs)(
        *wide, state.astype(case.arguments(1, 1, 1)[-1].dtype)
    )
    assert (y.dtype, final.dtype) == (jnp.dtype(dtype), state.dtype)
    # The state never rounds below float32; y once, to half a unit in the last place.
    assert_all_close(final.astype(exact_final.dtype), exact_final, 1e-4)
    half_unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    np.testing.assert_allclose(y.astype("float64"), exact_y, rtol=1.01 * half_unit, atol=1e-4)
    given = jax.grad(lambda *s: function(*s, state)[0].astype("float32").sum())(*stored)
    assert given.dtype == stored[0].dtype and bool(jnp.isfinite(given).all())


# ---- Transformations -----------------------------------------------------------------------------


@forward_cases
def test_vmap_folds_into_the_batch(x64: None, case: Case) -> None:
    one = case.arguments(2, 9, 3)
    # The first is shared; the others are mapped along axes of their own.
    axes = [None, *range(1, len(one) - 1), 0]
    many = [
        x if d is None else jnp.stack([x, 2 * x, -x], axis=d)
        for x, d in zip(one, axes, strict=True)
    ]
    factors = (1, 2, -1)

    def at(i: int) -> list[Array]:
        return [x if d is None else factors[i] * x for x, d in zip(one, axes, strict=True)]

    mapped = jax.vmap(case.ours, in_axes=axes)
    for i, y in enumerate(zip(*mapped(*many), strict=True)):
        assert_all_close(y, case.ours(*at(i)), 1e-14)
    pull = jax.vmap(partial(values_and_gradients, case.ours), in_axes=(axes,))
    for i, given in enumerate(zip(*pull(many)[1], strict=True)):
        assert_all_close(given, values_and_gradients(case.ours, at(i))[1], 1e-12)
    assert "scan" not in str(jax.make_jaxpr(mapped)(*many))
    jax.jvp(mapped, many, many)


@forward_cases
def test_scan_carries_the_state(x64: None, case: Case) -> None:
    *sequences, state = case.arguments(2, 24, 3)

    def step(state: Array, parts: list[Array]) -> Outputs:
        y, state = case.ours(*parts, state)
        return state, y

    def in_pieces(*args: Array) -> Outputs:
        cut = [jnp.stack(jnp.split(s, 4, axis=1)) for s in args[:-1]]
        final, y = lax.scan(step, args[-1], cut)
        return jnp.concatenate(list(y), axis=1), final

    arguments = [*sequences, state]
    assert_all_close(
        values_and_gradients(in_pieces, arguments),
        values_and_gradients(case.ours, arguments),
        1e-12,
    )


@pytest.mark.parametrize("check", [True, False])
@kernel_cases
def test_shard_map_over_the_batch(x64: None, case: Case, check: bool) -> None:
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    arguments = case.arguments(4, 9, 3)
    spec = PartitionSpec("batch")
    sharded = jax.shard_map(
        case.ours, mesh=mesh, in_specs=(spec,) * len(arguments), out_specs=spec, check_vma=check
    )
    assert_all_close(
        values_and_gradients(sharded, arguments), values_and_gradients(case.ours, arguments), 1e-12
    )
    # Without a state the zeros made inside do not vary over the mesh, the sequences do.
    no_state = jax.shard_map(
        case.ours, mesh=mesh, in_specs=(spec,) * (len(arguments) - 1), out_specs=spec
    )
    assert_all_close(no_state(*arguments[:-1]), case.ours(*arguments[:-1]), 1e-14)


def test_donated_buffers(x64: None) -> None:
    a, x, state = REAL.arguments(2, 50, 64)
    expected = linear_recurrence(a, x, state)
    assert_all_close(jax.jit(linear_recurrence, donate_argnums=(1, 2))(a, x, state), expected, 0)
    assert x.is_deleted() and state.is_deleted()


def test_many_threads_at_once() -> None:
    calls = []
    for case in KERNELS:
        arguments = case.arguments(3, 500, 64, wide=False)
        calls.append((jax.jit(partial(values_and_gradients, case.ours)), arguments))
    expected = [f(arguments) for f, arguments in calls]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: calls[i % 4][0](calls[i % 4][1]), range(40)))
    for i, given in enumerate(results):
        assert_all_close(given, expected[i % 4], 0)  # the same bits, whoever computes them


# ---- Errors --------------------------------------------------------------------------------------

SEQUENCE = jax.ShapeDtypeStruct((2, 5, 3), jnp.float32)


def like(shape: tuple[int, ...] = SEQUENCE.shape, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (linear_recurrence, [SEQUENCE, like((5, 3))], ValueError,
         r"linear_recurrence: x must be \(B, T, D\), got shape \(5, 3\)"),
        (linear_recurrence, [SEQUENCE, like(dtype=jnp.int32)], TypeError,
         "linear_recurrence: x must be one of float32, .*, got int32"),
        (linear_recurrence, [like((2, 4, 3)), SEQUENCE], ValueError,
         r"linear_recurrence: a must be \(2, 5, 3\) to go with x, got shape \(2, 4, 3\)"),
        (linear_recurrence, [like(dtype=jnp.complex64), SEQUENCE], TypeError,
         "linear_recurrence: a must be float32 as x is, got complex64"),
        (linear_recurrence, [SEQUENCE, SEQUENCE, like((2, 4))], ValueError,
         r"linear_recurrence: initial_state must be \(B, D\) = \(2, 3\), got shape \(2, 4\)"),
        (linear_recurrence, [like(dtype=jnp.bfloat16)] * 2 + [like((2, 3), jnp.bfloat16)],
         TypeError, "initial_state must be float32 for bfloat16 sequences, got bfloat16"),
        (gate_loop, [SEQUENCE, SEQUENCE, like((2, 5, 4)), SEQUENCE], ValueError,
         r"gate_loop: v must be \(2, 5, 3\) to go with q, got shape \(2, 5, 4\)"),
        (gate_loop, [like(dtype=jnp.complex64)] * 4, TypeError,
         "gate_loop: q must be one of .*, got complex64"),
        (gate_loop, [SEQUENCE] * 3 + [like(dtype=jnp.float16)], TypeError,
         "gate_loop: a must be float32 or complex64 for float32 sequences, got float16"),
        (polar_gate_loop, [SEQUENCE] * 4, ValueError,
         r"polar_gate_loop: z must be \(2, 5, 6\) to go with q, got shape \(2, 5, 3\)"),
        (polar_gate_loop, [SEQUENCE] * 3 + [like((2, 5, 6)), like((2, 3))], TypeError,
         "polar_gate_loop: initial_state must be complex64 for float32 sequences, got float32"),
    ],
)  # fmt: skip
def test_errors_at_trace_time_name_the_argument(
    function: Function, arguments: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        jax.eval_shape(function, *arguments)
