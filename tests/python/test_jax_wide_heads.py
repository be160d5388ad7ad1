"""gate_loop of gateloop_jax with heads wider than one channel, by the kernel and by the blocks of
time that serve where there is none: their numbers, and what may not be in memory."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import assert_near
from conftest import assert_no_collective, thinned
from jax import Array, export, lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gateloop_jax
from gateloop_jax import _wide_heads

gate_loop: Any = gateloop_jax.gate_loop  # of lists of arguments
BATCH, HEADS, KEYS, VALUES = 2, 2, 3, 4
Function = Callable[..., tuple[Array, Array]]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, params=["kernel", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """By which gate_loop is computed. Its programs are kept by shapes alone."""
    if request.param == "blocks":
        monkeypatch.setattr(
            _wide_heads, "bind", lambda _, *x, **o: _wide_heads._definition(*x, **o)
        )
        gate_loop.clear_cache()
    yield str(request.param)
    if request.param == "blocks":
        gate_loop.clear_cache()


def features(x: Array) -> Array:
    """Written out: 1, x_i, and all x_i x_j / √2, of which the state of ours has each once."""
    pairs = [x[..., i] * x[..., i] / np.sqrt(2) for i in range(x.shape[-1])]
    pairs += [x[..., i] * x[..., j] for i in range(x.shape[-1]) for j in range(i)]
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, jnp.stack(pairs, -1)], -1)


@partial(jax.jit, static_argnames=("reverse", "taylor"))
def by_steps(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    state: Array,
    reverse: bool = False,
    taylor: bool = False,
) -> tuple[Array, Array]:
    """The definition, step by step."""
    if taylor:
        q, k = features(q), features(k)

    def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, a = now
        a = a[..., None] if a.ndim == 3 else a[..., None, None]
        state = a * state + k[..., :, None] * v[..., None, :]
        return state, jnp.sum(q[..., None] * state.real, -2)

    sequences = [jnp.moveaxis(s, 1, 0) for s in (q, k, v, a)]
    state, y = lax.scan(step, state, tuple(sequences), reverse=reverse)
    return jnp.moveaxis(y, 0, 1), state


def drawn(time: int, kind: str, dtype: Any = "float64") -> list[Array]:
    """q, k, v, a and a state. `kind`: words of "complex", "key", "taylor", "zeros"."""
    rng = np.random.default_rng(time)
    real = jnp.dtype(dtype)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape)

    shape = (BATCH, time, HEADS, *([KEYS] if "key" in kind else []))
    # Magnitudes from 1e-12 to 1, half of them within 0.01 of 1.
    near_one = 1 - rng.random(shape) / 100
    a: Any = np.where(rng.random(shape) < 0.5, near_one, 10.0 ** -rng.integers(0, 13, shape))
    if "zeros" in kind:
        a *= rng.random(shape) > 0.1
    keys = 10 if "taylor" in kind else KEYS
    state: Any = normal(BATCH, HEADS, keys, VALUES)
    if "complex" in kind:
        a = a * np.exp(1j * np.pi * normal(*shape))
        state = state + 1j * normal(*state.shape)
        of_state = jnp.promote_types(real, "complex64")
    else:
        of_state = real
    q, k = normal(BATCH, time, HEADS, KEYS), normal(BATCH, time, HEADS, KEYS)
    v = normal(BATCH, time, HEADS, VALUES)
    return [
        *(jnp.asarray(x, real) for x in (q, k, v)),
        *(jnp.asarray(x, of_state) for x in (a, state)),
    ]


def ours_and_theirs(kind: str, reverse: bool = False) -> tuple[Function, Function]:
    taylor = "taylor" in kind
    ours = partial(gate_loop, reverse=reverse, feature_map="taylor" if taylor else "none")
    return ours, partial(by_steps, reverse=reverse, taylor=taylor)


def loss_of(f: Function) -> Callable[..., Array]:
    def loss(*given: Array) -> Array:
        y, final = f(*given)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(jnp.sin(y) * weights) + jnp.sum(jnp.real(final * final))

    return loss


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Of the largest number of each channel, over batch and time."""
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert our.shape == their.shape and our.dtype == their.dtype
        assert_near(our, their, tolerance, of=tuple(range(2, our.ndim)), least=1e-3)


KINDS = ["real", "complex", "real key", "complex key zeros", "complex zeros", "complex taylor"]


def with_gradients(f: Function, given: list[Array]) -> Any:
    gradients = jax.grad(loss_of(f), argnums=tuple(range(5)))
    return jax.jit(lambda *x: (f(*x), gradients(*x)))(*given)


@cache
def expected_with_gradients(kind: str, time: int, reverse: bool) -> Any:
    """For both ways."""
    return with_gradients(ours_and_theirs(kind, reverse)[1], drawn(time, kind))


# Around powers of two and the blocks of 64: one block that is not full, some and a rest.
FORWARD, REVERSE = [1, 63, 65, 129, 5], [300, 65, 64, 2]


@pytest.mark.parametrize(
    ("time", "reverse"),
    thinned([(t, False) for t in FORWARD], 2) + thinned([(t, True) for t in REVERSE], 2),
)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_with_gradients(kind: str, time: int, reverse: bool) -> None:
    got = with_gradients(ours_and_theirs(kind, reverse)[0], drawn(time, kind))
    # Rounding is 1e-16, sums have some hundred terms.
    assert_close(got, expected_with_gradients(kind, time, reverse), 1e-11)


def tangents_and_second_order(f: Function, given: list[Array]) -> Any:
    moves = [jnp.cos(x) for x in given]
    gradients = jax.grad(loss_of(f), argnums=tuple(range(5)))

    def along_moves(*x: Array) -> Any:
        pairs = zip(gradients(*x), moves, strict=True)
        return sum(jnp.sum(jnp.real(a * b)) for a, b in pairs)

    return (
        jax.jit(lambda *x: jax.jvp(f, x, tuple(moves)))(*given),
        jax.jit(lambda *x: jax.jvp(gradients, x, tuple(moves)))(*given),
        jax.jit(jax.grad(along_moves, argnums=(0, 3)))(*given),
    )


@pytest.mark.parametrize(
    ("way", "kind"),
    thinned(
        product(["kernel", "blocks"], ["complex zeros", "complex taylor", "real key zeros"]), 3
    ),
    indirect=["way"],
)
def test_forward_mode_and_second_order(kind: str) -> None:
    given = drawn(70, kind)
    got, expected = (tangents_and_second_order(f, given) for f in ours_and_theirs(kind))
    assert_close(got, expected, 1e-10)


def test_vmap_over_any_arguments() -> None:
    q, k, v, a, state = drawn(70, "complex key")
    many = jnp.stack([a, a * 0.5, a.conj()])
    ours = jax.vmap(gate_loop, (None, None, 0, 0, None))(q, k, jnp.stack([v, -v, v]), many, state)
    for i, sign in enumerate((1, -1, 1)):
        assert_close([r[i] for r in ours], gate_loop(q, k, sign * v, many[i], state), 1e-14)


@pytest.mark.parametrize("kind", thinned(["real key", "real", "complex zeros", "complex key"], 2))
def test_float32_is_accurate_over_many_steps(kind: str) -> None:
    time = 5000
    exact = drawn(time, kind)
    if "zeros" not in kind:  # that remember thousands of steps, whose phases turn
        a = exact[3] / jnp.abs(exact[3])
        exact[3] = a * (1 - 1e-4 * jnp.abs(jnp.sin(jnp.arange(a.size)).reshape(a.shape)))
    single = [x.astype("complex64" if jnp.iscomplexobj(x) else "float32") for x in exact]
    exact = [x.astype("complex128" if jnp.iscomplexobj(x) else "float64") for x in single]
    ours, theirs = gate_loop(*single), by_steps(*exact)
    # A rounding is 6e-8; of the thousands of steps that a state keeps, errors add up as a random
    # walk. Products that round to one side near 1 are off by 5e-5.
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.astype(their.dtype), their, 1e-5)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_float32_is_accurate_with_constant_transitions(kind: str, way: str) -> None:
    """A rounding error of a² is 32 times in a^64, that of a^64 hundreds of times in the state."""
    time = 20000
    transitions: Any = [[sign * (1 - u) for sign in (1, -1)] for u in (1e-3, 1e-4, 1e-5)]
    if kind == "complex":
        transitions = [[(1 - u) * np.exp(1j * x) for x in (0.1, 2.5)] for u in (1e-3, 1e-4, 1e-5)]
    a = jnp.broadcast_to(jnp.ravel(jnp.array(transitions)), (1, time, 6))
    a = a.astype("complex64" if kind == "complex" else "float32")
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, time, 6, 2), "float32") for key in keys[:3])
    state = jax.random.normal(keys[3], (1, 6, 2, 2)).astype(a.dtype)

    def both(f: Function, *given: Array) -> Any:
        y, back = jax.vjp(lambda *x: f(*x)[0], *given)
        return y, *(back(y) if kind == "complex" else ())  # compiles for seconds

    single = (q, k, v, a, state)
    wide = [x.astype("complex128" if jnp.iscomplexobj(x) else "float64") for x in single]
    ours, theirs = jax.jit(partial(both, gate_loop))(*single), both(by_steps, *wide)
    # Blocks: errors of single roundings, 6e-8, that differ from step to step, and their sum of
    # sums. The kernel rounds the state once a step, as by_steps in float32, off by 2.2e-5.
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.astype(their.dtype), their, 3e-6 if way == "blocks" else 4e-5)


@pytest.mark.parametrize("kind", thinned(["complex zeros", "real key zeros"], 2))
def test_float32_derivatives(kind: str) -> None:
    """Of products that keep their error: zeros, forward mode, second order, vmap."""
    single = drawn(4, kind, "float32")
    wide = [x.astype("complex128" if jnp.iscomplexobj(x) else "float64") for x in single]

    def derivatives(f: Function, *given: Array) -> Any:
        moves = [jnp.cos(x) for x in given]
        gradients = jax.grad(loss_of(f), argnums=tuple(range(5)))
        values, second = jax.jvp(gradients, given, tuple(moves))
        per_row = jax.vmap(gradients)(*(x[:, None] for x in given))
        return values, second, per_row

    ours, theirs = (
        jax.jit(partial(derivatives, f))(*given)
        for f, given in zip(ours_and_theirs(kind), (single, wide), strict=True)
    )
    ours = jax.tree.map(lambda x, y: x.astype(y.dtype), ours, theirs)
    assert_close(ours, theirs, 1e-5)  # a rounding is 6e-8, sums have some ten terms


def test_products_of_tiny_transitions_are_zero() -> None:
    """In float32 they underflow; their error must not be what is no number."""
    a = jnp.array([1e-20, 1e-20, 1e-30, 0, 1, 0, 0, 1e-38], "float32")
    a = (a * (0.6 + 0.8j)).reshape(1, 8, 1).astype("complex64")
    one = jnp.ones((1, 8, 1, 1), "float32")
    y, back = jax.vjp(lambda a: gate_loop(one, one, one, a)[0], a)
    exact = by_steps(one, one, one, a, jnp.zeros((1, 1, 1, 1), "complex64"))[0]
    np.testing.assert_allclose(y, exact, rtol=1e-6)
    assert jnp.isfinite(back(y)[0]).all()


@pytest.mark.parametrize("dtype", thinned(["bfloat16", "float16"], 2))
def test_half_precision_is_storage_only(dtype: str) -> None:
    q, k, v, a, state = drawn(100, "complex", "float32")
    half = [x.astype(dtype) for x in (q, k, v)]
    y, final = gate_loop(*half, a, state)
    wide_y, wide_final = gate_loop(*(x.astype("float32") for x in half), a, state)
    assert y.dtype == dtype and final.dtype == "complex64"
    np.testing.assert_array_equal(y, wide_y.astype(dtype))
    np.testing.assert_array_equal(final, wide_final)
    gradients = jax.grad(lambda *x: gate_loop(*x, state)[0].sum(), argnums=(0, 1, 2, 3))(*half, a)
    assert [str(g.dtype) for g in gradients] == [dtype] * 3 + ["complex64"]


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_no_number_reaches_no_earlier_step(reverse: bool) -> None:
    q, k, v, a, state = drawn(100, "complex")
    expected = gate_loop(q, k, v, a, state, reverse)[0]
    for broken in (1, 2):
        given = [q, k, v, a, state]
        given[broken] = given[broken].at[:, 50].set(jnp.nan)
        y = gate_loop(*given, reverse)[0]
        before = slice(51, None) if reverse else slice(0, 50)
        np.testing.assert_allclose(y[:, before], expected[:, before], rtol=1e-12)
        assert jnp.isnan(y[:, 50]).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_no_steps(reverse: bool) -> None:
    given = drawn(0, "complex key")
    y, final = gate_loop(*given, reverse)
    assert y.shape == (BATCH, 0, HEADS, VALUES)
    np.testing.assert_array_equal(final, given[-1])


def test_calls_outside_of_jit_compile_once(caplog: pytest.LogCaptureFixture) -> None:
    given = drawn(5, "complex")

    def call() -> None:
        gradients = jax.grad(lambda *x: jnp.sum(gate_loop(*x)[0]), (0, 3))(*given)
        jax.block_until_ready((gate_loop(*given), gradients))

    call()
    with jax.log_compiles():
        call()
        assert not caplog.messages
        gate_loop(*drawn(9, "complex"))
    assert any("Compiling" in message for message in caplog.messages)


# ---- Memory --------------------------------------------------------------------------------------


def sizes(jaxpr: Any) -> Iterator[tuple[int, str]]:
    """Of every array that a program names, in its loops too."""
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            yield out.aval.size, f"{equation.primitive} -> {out.aval}"
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("reverse", thinned([False, True], 2))
@pytest.mark.parametrize("kind", ["complex", "real key", "complex taylor"])
def test_states_of_all_steps_are_nowhere(kind: str, reverse: bool) -> None:
    time, width = 2048, 16
    taylor = "taylor" in kind
    keys = 1 + width + width * (width + 1) // 2 if taylor else width
    q = jnp.ones((1, time, 1, width))
    a = jnp.ones(q.shape if "key" in kind else q.shape[:3], complex if "complex" in kind else float)
    ours, _ = ours_and_theirs(kind, reverse)

    def both(*given: Array) -> Any:
        gradients = jax.grad(lambda *x: jnp.sum(ours(*x)[0]), argnums=(0, 1, 2, 3))
        return ours(*given), gradients(*given)

    given = (q, q, q, a)
    largest, name = max(sizes(jax.make_jaxpr(both)(*given).jaxpr))
    # The parts of one state a block, and what the sequences take; features of a block.
    parts = 2 if "complex" in kind else 1
    chunk = 16 if "key" in kind else 64
    allowed = max(time // chunk * parts * keys * width, time * width)
    assert largest <= allowed < time * keys * width / 8, name
    assert allowed < time * keys or not taylor
    compiled = jax.jit(both).lower(*given).compile()
    # In float64: all states would be 4 MiB of real numbers, of Taylor's keys 40.
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 8 * time * keys * width * 0.75


# ---- Sharded arrays and export -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "axis"), thinned(product([AxisType.Explicit, AxisType.Auto], [0, 2]), 3), ids=str
)
def test_sharded_along_batch_or_heads(axis: int, kind: AxisType) -> None:
    sequences = drawn(70, "complex")[:4]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    spec = PartitionSpec(*[None] * axis, "x")

    def both(*given: Array) -> Any:
        y, back = jax.vjp(lambda *x: gate_loop(*x)[0], *given)
        return y, back(y)

    expected = both(*sequences)
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, NamedSharding(mesh, spec)) for x in sequences]
        program = jax.jit(both).lower(*put).compile()
        got = program(*put)
    assert_no_collective(program)
    if kind == AxisType.Explicit:
        assert {jax.typeof(x).sharding.spec[axis] for x in jax.tree.leaves(got)} == {"x"}
    assert_close(jax.device_get(got), expected, 1e-12)


def test_vmap_of_some_arguments_on_an_explicit_axis() -> None:
    q, k, v, a, state = drawn(70, "complex")
    values = jnp.stack([v, -v])
    expected = jax.vmap(gate_loop, (None, None, 0, None, None))(q, k, values, a, state)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        values = jax.device_put(values, NamedSharding(mesh, PartitionSpec("x")))
        got = jax.jit(jax.vmap(gate_loop, (None, None, 0, None, None)))(q, k, values, a, state)
    assert_close(jax.device_get(got), expected, 1e-12)


def test_gradients_of_another_device_than_the_forward_pass_are_right_or_huge(
    way: str,
) -> None:
    """Partitioned programs keep no states for the kernel."""
    sequences = drawn(70, "complex")[:4]
    y, back = jax.vjp(lambda *x: gate_loop(*x)[0], *sequences)
    expected = back(jnp.ones_like(y))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    _, back = jax.vjp(
        lambda *x: gate_loop(*x)[0], *(jax.device_put(x, sharding) for x in sequences)
    )
    back = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), back)
    got = back(jnp.ones_like(y))
    if way == "blocks":
        assert_close(got, expected, 1e-12)
    else:
        assert not (jnp.abs(got[0]) < 1e100).all()


def test_no_keys_are_one_feature_of_the_taylor_map() -> None:
    q, v = jnp.zeros((1, 2, 1, 0)), jnp.ones((1, 2, 1, 2))
    y, final = gate_loop(q, q, v, jnp.ones((1, 2, 1)), feature_map="taylor")
    np.testing.assert_array_equal(y[0, :, 0], [[1, 1], [2, 2]])
    assert final.shape == (1, 1, 1, 2)


def test_time_on_an_explicit_axis_is_refused() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = NamedSharding(mesh, PartitionSpec(None, "x"))
        sequences = [jax.device_put(x, put) for x in drawn(70, "real")[:4]]
        with pytest.raises(ValueError, match="gate_loop: time must not be sharded, got f64"):
            gate_loop(*sequences)


def test_exported_for_any_batch_and_time_with_a_vjp() -> None:
    batch, time = export.symbolic_shape("b, t")
    shapes = [
        jax.ShapeDtypeStruct((batch, time, *x.shape[2:]), x.dtype) for x in drawn(1, "complex")[:4]
    ]
    checks = [
        export.DisabledSafetyCheck.custom_call(f"gateloop_{name}")
        for name in ("gate_loop", "gate_loop_backward")
    ]
    function = jax.jit(lambda *x: gate_loop(*x)[0])
    exported = export.export(function, disabled_checks=checks)(*shapes)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    given = drawn(70, "complex")[:4]
    ours, back = jax.vjp(loaded.call, *given)
    theirs, their_back = jax.vjp(lambda *x: gate_loop(*x)[0], *given)
    assert_close((ours, back(ours)), (theirs, their_back(theirs)), 1e-13)
