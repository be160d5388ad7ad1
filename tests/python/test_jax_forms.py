"""Forms of gate_loop in gateloop_jax: the same values and gradients."""

from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from channels import assert_near
from conftest import thinned
from jax import Array
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gateloop_jax
from gateloop_cpp import ops

gate_loop: Any = gateloop_jax.gate_loop  # of lists of arguments
FORMS = ("attention", "recurrent")
KINDS = ("real", "complex", "complex key", "real taylor", "max")
CLOSE: Any = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def drawn(time: int, kind: str, modulus: str = "any", count: int | None = None) -> list[Array]:
    """q, k, v, a of two rows, and a state, or `count` of each row."""
    rng = np.random.default_rng(time)
    heads, channels, values = (2, (), ()) if kind == "max" else (2, (3,), (4,))
    q, k = rng.standard_normal((2, 2, time, heads, *channels))
    v = rng.standard_normal((2, time, heads, *values))
    shape = (2, time, heads, *(channels if "key" in kind else ()))
    a: Any = np.full(shape, 0.5) if modulus == "half" else 1 - rng.random(shape) ** 4
    if modulus == "zeros":
        a[:, ::5] = 0
    keys = (10,) if "taylor" in kind else channels
    rows = (2,) if count is None else (2, count)
    state: Any = rng.standard_normal((*rows, heads, *keys, *values))
    if "real" not in kind:
        a = a * np.exp(6j * rng.random(shape))
        state = state + 1j * rng.standard_normal(state.shape)
    return [jnp.asarray(x) for x in (q, k, v, a, state)]


def options_of(kind: str, **options: Any) -> dict[str, Any]:
    return options | (dict(feature_map="taylor") if "taylor" in kind else {})


def with_gradients(f: Any, given: list[Array]) -> Any:
    def loss(*given: Array) -> Any:
        y, final = f(*given)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(jnp.sin(y) * weights) + jnp.sum(jnp.real(final * final)), (y, final)

    return jax.jit(jax.grad(loss, argnums=tuple(range(5)), has_aux=True))(*given)


def assert_close(ours: Any, theirs: Any, **tolerance: Any) -> None:
    for x, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == expected.shape and x.dtype == expected.dtype
        np.testing.assert_allclose(x, expected, **(tolerance or CLOSE))


@cache
def by_scan(time: int, kind: str, reverse: bool) -> Any:
    f = partial(gate_loop, reverse=reverse, **options_of(kind, form="scan"))
    return with_gradients(f, drawn(time, kind, "zeros"))


# Around tiles of 64 steps: one that is not full, two, and a rest.
TIMES = [(0, False), (1, True), (63, False), (64, True), (65, False), (130, True), (257, False)]


@pytest.mark.parametrize(
    ("kind", "time", "reverse", "form"),
    thinned([(k, *t, f) for f, k, t in product(FORMS, KINDS, TIMES)], 3),
)
def test_values_and_gradients(kind: str, time: int, reverse: bool, form: str) -> None:
    f = partial(gate_loop, reverse=reverse, **options_of(kind, form=form))
    got = with_gradients(f, drawn(time, kind, "zeros"))
    assert_close(got, by_scan(time, kind, reverse))


@pytest.mark.parametrize(
    ("kind", "modulus"), thinned(product(["real", "complex"], ["half", "any", "zeros"]), 2)
)
@pytest.mark.parametrize("form", FORMS)
def test_long_sequences(kind: str, modulus: str, form: str) -> None:
    given = drawn(4096, kind, modulus)
    got, expected = (
        with_gradients(partial(gate_loop, form=name), given) for name in (form, "auto")
    )
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(got))
    # Sums of thousands of terms, as the operators of torch are compared.
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_those_of_torch(form: str, kind: str) -> None:
    given = drawn(70, kind, "zeros")
    tensors = [torch.from_numpy(np.array(x)) for x in given]
    by_torch: Any = ops.gate_loop
    theirs = by_torch(*tensors, True, **options_of(kind, form=form))
    ours = gate_loop(*given, True, **options_of(kind, form=form))
    for x, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, expected.numpy(), **CLOSE)


@pytest.mark.parametrize(
    ("form", "kind", "reverse"), thinned(product(FORMS, KINDS, [False, True]), 7)
)
def test_packed_and_padded(form: str, kind: str, reverse: bool) -> None:
    """With a state for each sequence, and with one for a row."""
    ids = np.stack([np.repeat([2, 0, -1, 2], [70, 1, 9, 20]), np.repeat([1, 3], [30, 70])])
    mask = np.random.default_rng(0).random(ids.shape) > 0.3
    for count in (4, None):
        given = drawn(100, kind, "zeros", count)
        options = options_of(kind, segment_ids=ids, mask=mask, num_segments=count)
        got, expected = (
            with_gradients(partial(gate_loop, reverse=reverse, form=name, **options), given)
            for name in (form, "scan")
        )
        assert_close(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_every_mode(form: str) -> None:
    given = drawn(66, "complex", "zeros")
    moves = [jnp.cos(x) for x in given]

    def derivatives(form: str) -> Any:
        f = partial(gate_loop, form=form)
        gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x)[0])), argnums=tuple(range(5)))

        def along_moves(*x: Array) -> Any:
            return [jax.jvp(g, x, tuple(moves)) for g in (f, gradients)]

        return jax.jit(along_moves)(*given)

    assert_close(derivatives(form), derivatives("scan"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_any_arguments(form: str) -> None:
    q, k, v, a, state = drawn(70, "complex key")
    call: Any = jax.vmap(partial(gate_loop, form=form), (None, None, 0, None, 0))
    got = call(q, k, jnp.stack([v, -v]), a, jnp.stack([state, 2 * state]))
    for i, given in enumerate(((q, k, v, a, state), (q, k, -v, a, 2 * state))):
        assert_close([x[i] for x in got], gate_loop(*given))


@pytest.mark.parametrize("kind", ["complex", "max"])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_storage_only(form: str, kind: str) -> None:
    q, k, v, a, state = drawn(200, kind)
    half = [x.astype("bfloat16") for x in (q, k, v)]
    y, final = gate_loop(*half, *(x.astype("complex64") for x in (a, state)), form=form)
    assert (y.dtype, final.dtype) == ("bfloat16", "complex64")
    wide = [x.astype("float64") for x in half]
    expected, expected_final = gate_loop(*wide, a, state)
    # y is rounded once; float32 sums some hundred terms.
    assert_near(y, expected, 1e-5, relative=2**-8, of=tuple(range(2, y.ndim)))
    assert_near(final, expected_final, 1e-5)


@pytest.mark.parametrize(
    ("form", "kind", "reverse"),
    thinned(product(FORMS, ["complex", "max"], [False, True]), 3),
)
def test_blocks_of_time_equal_the_whole(form: str, kind: str, reverse: bool) -> None:
    mesh = jax.make_mesh((3,), ("time",), axis_types=(AxisType.Auto,))
    given, by_time = drawn(12, kind), P(None, "time")
    call = jax.shard_map(
        partial(gate_loop, reverse=reverse, form=form, axis_name="time"),
        mesh=mesh,
        in_specs=(*(by_time,) * 4, P()),
        out_specs=(by_time, P()),
    )
    expected = with_gradients(partial(gate_loop, reverse=reverse), given)
    assert_close(with_gradients(call, given), expected)


@pytest.mark.parametrize(
    ("form", "kind", "axis"),
    thinned(product(FORMS, [AxisType.Explicit, AxisType.Auto], [0, 2]), 2),
)
def test_sharded_along_batch_or_heads(form: str, kind: AxisType, axis: int) -> None:
    given = drawn(130, "complex")[:4]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))

    def both(form: str, *given: Array) -> Any:
        y, back = jax.vjp(lambda *x: gate_loop(*x, form=form)[0], *given)
        return y, back(y)

    expected = both("scan", *given)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(*[None] * axis, "x"))
        got = jax.jit(partial(both, form))(*jax.device_put(given, sharding))
    assert_close(jax.device_get(got), expected)


def sizes(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("kind", ["complex", "complex key", "max"])
def test_no_square_of_time_is_in_memory(kind: str) -> None:
    time = 4096
    given = drawn(time, kind)

    def both(*given: Array) -> Any:
        return with_gradients(partial(gate_loop, form="attention"), list(given))

    # Decays and scores of tiles: 64 numbers a step, of two rows of two heads, and what is made of
    # real and imaginary parts.
    assert max(sizes(jax.make_jaxpr(both)(*given).jaxpr)) <= 4 * 64 * time < time * time / 8


@pytest.mark.parametrize("form", FORMS)
def test_features_of_all_steps_are_nowhere(form: str) -> None:
    time, width = 16384, 16
    q = jnp.ones((1, time, 1, width))
    v, a = q[..., :2], jnp.ones((1, time, 1), complex)

    def both(*given: Array) -> Any:
        f = partial(gate_loop, form=form, feature_map="taylor")
        return f(*given), jax.grad(lambda *x: jnp.sum(f(*x)[0].real), argnums=(0, 1, 2, 3))(*given)

    keys = 1 + width + width * (width + 1) // 2
    # What the sequences take, or attention's decays between the steps of all tiles of 64.
    largest = max(sizes(jax.make_jaxpr(both)(q, q, v, a).jaxpr))
    assert largest <= time * 64 < time * keys / 2
    compiled = jax.jit(both).lower(q, q, v, a).compile()
    memory: Any = compiled.memory_analysis()
    # Half of the features of q and k, in float64.
    assert memory.temp_size_in_bytes < 8 * time * keys


def test_other_forms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"form must be one of auto, scan, .*, got 'chunked'"):
        gate_loop(*drawn(3, "real"), form="chunked")
