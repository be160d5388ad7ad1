"""gateloop_jax over blocks of time on the devices of a mesh axis: the same as over the whole."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import channel_errors
from conftest import thinned
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gateloop_jax import (
    GateLoopTransformer,
    _wide_heads,
    gate_loop,
    linear_recurrence,
    polar_gate_loop,
)

Function = Callable[..., Any]


class Case:
    """A function with arguments of two sequences and TIME steps."""

    def __init__(self, function: Function, dtype: str = "float64", heads: str = "") -> None:
        self.function, self.dtype, self.heads = function, dtype, heads

    def __str__(self) -> str:
        return "-".join(word for word in (self.function.__name__, self.dtype, self.heads) if word)

    def arguments(self, time: int, gate: str) -> tuple[list[Array], Array]:
        """The sequences, and the initial state."""
        keys = iter(jax.random.split(jax.random.key(0), 9))

        def normal(*shape: int, dtype: str = "float64") -> Array:
            return jax.random.normal(next(keys), shape, dtype)

        def transitions(*shape: int) -> Array:
            a = normal(*shape, dtype=self.dtype)
            a = a / jnp.abs(a)
            if gate == "zeros":
                return a * (jax.random.uniform(next(keys), shape) > 0.2)
            return a if gate == "ones" else a * jax.random.uniform(next(keys), shape, "float64")

        shape = (2, time, 3)
        if self.function is linear_recurrence:
            x = normal(*shape, dtype=self.dtype)
            return [transitions(*shape), x], normal(2, 3, dtype=self.dtype)
        if self.function is polar_gate_loop:
            z = normal(2, time, 6) * (1000 if gate == "ones" else 1)
            return [*(normal(*shape) for _ in "qkv"), z], normal(2, 3, dtype="complex128")
        if not self.heads:
            state = normal(2, 3, dtype=self.dtype)
            return [*(normal(*shape) for _ in "qkv"), transitions(*shape)], state
        qk = (2, time, 2, 3)
        a = transitions(*(qk if self.heads == "key" else qk[:3]))
        keys_of = 10 if self.heads == "taylor" else 3
        state = normal(2, 2, keys_of, 4, dtype=self.dtype)
        return [normal(*qk), normal(*qk), normal(2, time, 2, 4), a], state


CASES = [
    Case(linear_recurrence),
    Case(linear_recurrence, "complex128"),
    Case(polar_gate_loop),
    Case(gate_loop),
    Case(gate_loop, "complex128"),
    Case(gate_loop, "complex128", "head"),
    Case(gate_loop, heads="key"),
    Case(gate_loop, "complex128", "taylor"),
]


@pytest.fixture(autouse=True)
def double() -> Any:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))


def value_and_gradients(call: Function, sequences: list[Array], state: Array, g: Array) -> Any:
    """A loss of y and the final state, and what it is made of; gradients of all arguments."""

    def loss(sequences: list[Array], state: Array) -> tuple[Array, Any]:
        y, final = call(sequences, state)
        weighed = jnp.sum(jnp.sin(y * g.reshape(g.shape + (1,) * (y.ndim - 2))))
        return jnp.real(weighed + jnp.sum(final * final)), (y, final)

    (_, outputs), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(sequences, state)
    return outputs, gradients


def check(case: Case, mesh: jax.sharding.Mesh, gate: str, time: int = 16, **options: Any) -> None:
    given = {k: v for k, v in options.items() if k in ("segment_ids", "mask")}
    rest = {k: v for k, v in options.items() if k not in given}
    if case.heads == "taylor":
        rest["feature_map"] = "taylor"
    sequences, state = case.arguments(time, gate)
    g = jax.random.normal(jax.random.key(1), (2, time), "float64")

    def whole(sequences: list[Array], state: Array) -> Any:
        return case.function(*sequences, state, **given, **rest)

    def block(sequences: list[Array], state: Array, given: dict[str, Array]) -> Any:
        return case.function(*sequences, state, axis_name="time", **given, **rest)

    by_time = P(None, "time")
    sharded = jax.shard_map(
        block, mesh=mesh, in_specs=(by_time, P(), by_time), out_specs=(by_time, P())
    )

    def blocks(sequences: list[Array], state: Array) -> Any:
        return sharded(sequences, state, given)

    ours = jax.jit(lambda *args: value_and_gradients(blocks, *args))(sequences, state, g)
    theirs = value_and_gradients(whole, sequences, state, g)
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-10, atol=1e-10)


WAYS = [(False, "ordinary"), (True, "ordinary"), (False, "ones"), (True, "zeros")]


@pytest.mark.parametrize(
    ("case", "reverse", "gate"),
    thinned([(case, *way) for case in CASES for way in WAYS], 3),
    ids=str,
)
def test_blocks_equal_the_whole(
    case: Case, reverse: bool, gate: str, mesh: jax.sharding.Mesh
) -> None:
    check(case, mesh, gate, reverse=reverse)


@pytest.mark.parametrize(("case", "reverse"), thinned(product(CASES, [False, True]), 3), ids=str)
def test_packed_and_padded(case: Case, reverse: bool, mesh: jax.sharding.Mesh) -> None:
    """Sequences end between blocks, and inside of them."""
    ids = jnp.array([[0] * 8 + [1] * 8, [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 2, 2]])
    mask = jax.random.uniform(jax.random.key(2), (2, 16)) > 0.3
    check(case, mesh, "ordinary", reverse=reverse, segment_ids=ids)
    check(case, mesh, "ordinary", reverse=reverse, segment_ids=ids, mask=mask)


@pytest.mark.parametrize("time", [0, 4])
def test_few_steps(time: int, mesh: jax.sharding.Mesh) -> None:
    for case in CASES:
        check(case, mesh, "ordinary", time=time)


def test_states_travel_and_sequences_do_not(mesh: jax.sharding.Mesh) -> None:
    """Two states to every device, and one back to all, whatever T is."""

    def block(a: Array, x: Array) -> Any:
        return linear_recurrence(a, x, axis_name="time")

    by_time = P(None, "time")
    call = jax.shard_map(block, mesh=mesh, in_specs=(by_time,) * 2, out_specs=(by_time, P()))
    for time in (12, 1000):
        program = str(jax.make_jaxpr(call)(*jnp.ones((2, 2, time, 4))))
        sent = re.findall(r"f64\[([\d,]+)\]\S* = (all_\w+|p\w*sum\w*|ppermute)\[", program)
        assert [shape for shape, _ in sent] == ["4,2,4", "4,2,4", "2,4"]


def test_models_over_blocks_of_time(mesh: jax.sharding.Mesh) -> None:
    options: dict[str, Any] = dict(num_tokens=16, dim=8, architecture="pytorch", heads=2)
    model = GateLoopTransformer(
        depth=2, key=jax.random.key(0), simple_gate_loop=True, gate_loop_heads=4, **options
    )
    ids = jax.random.randint(jax.random.key(1), (2, 16), 0, 16)
    segments = jnp.asarray(np.repeat([[1, 2, 1]], [3, 7, 6], 1) + np.zeros((2, 1), int))

    def block(ids: Array, segments: Array) -> Array:
        return model(ids, segments, axis_name="time")

    spec = P(None, "time")
    over_blocks = jax.shard_map(block, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_allclose(over_blocks(ids, segments), model(ids, segments), atol=1e-5)


WINDOWED: dict[str, Any] = dict(num_tokens=16, dim=8, architecture="pytorch", dim_head=4, heads=2)


def windowed(window: int | None, dtype: str = "float64", **options: Any) -> GateLoopTransformer:
    options = WINDOWED | dict(layers="attention", depth=1, window=window) | options
    model = GateLoopTransformer(key=jax.random.key(0), **options)
    cast: GateLoopTransformer = jax.tree.map(lambda w: w.astype(dtype), model)
    return cast


def drawn_sequences(time: int) -> tuple[Array, Array]:
    """Ids, and those of segments: one sequence, and several that end inside of blocks and between
    them, the last by the number of the first."""
    ids = jax.random.randint(jax.random.key(1), (2, time), 0, 16)
    lengths = [time // 4 - 1, 1, time // 2 + 1, 1, time // 4 - 2]
    return ids, jnp.asarray(np.stack([np.zeros(time, int), np.repeat([1, 2, 3, 4, 1], lengths)]))


def logits_and_gradients(
    logits_of: Function, model: GateLoopTransformer, ids: Array, *packing: Array
) -> Any:
    def loss(model: GateLoopTransformer) -> tuple[Array, Array]:
        logits = logits_of(model, ids, *packing)
        places = jnp.arange(logits.size, dtype=logits.dtype).reshape(logits.shape)
        return jnp.sum(jnp.sin(logits + places)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    return logits, gradients


def over_axis(
    mesh: jax.sharding.Mesh,
    axis_name: str | tuple[str, ...] = "time",
    rows: str | None = None,
    packed: bool = True,
) -> Function:
    """Of a model and ids, of segments too where packed: its logits, by blocks of time."""

    def block(model: GateLoopTransformer, ids: Array, segments: Array | None = None) -> Array:
        return model(ids, segments, axis_name=axis_name)

    by_time = P(rows, axis_name)
    return jax.shard_map(
        block,
        mesh=mesh,
        in_specs=(P(), *[by_time] * (1 + packed)),
        out_specs=by_time,
    )


# Blocks have 4 steps: a window of one reads no other, of 5 a whole one, of 7 two. In those of 12,
# steps are read by blocks of a window.
@pytest.mark.parametrize(
    ("window", "time", "options"),
    thinned(
        [
            (7, 16, dict(rotary_emb=True)),
            (5, 48, dict(rotary_emb=True)),
            (1, 16, {}),
            (3, 16, dict(data_dependent_rel_pos=True)),
            (5, 16, dict(rotary_emb=True, attn_softmax_normalize=False)),
            (12, 48, dict(attn_add_swish_gating=False)),
            (13, 16, dict(layers="gate_loop,attention", depth=2, simple_gate_loop=True)),
            (99, 16, dict(rotary_emb=True)),
        ],
        2,
    ),
    ids=str,
)
def test_windows_over_blocks_of_time(
    window: int, time: int, options: dict[str, Any], mesh: jax.sharding.Mesh
) -> None:
    model = windowed(window, **options)
    ids, segments = drawn_sequences(time)
    for packing in [(), (segments,)]:
        blocks = over_axis(mesh, packed=bool(packing))
        ours = logits_and_gradients(blocks, model, ids, *packing)
        theirs = logits_and_gradients(lambda model, *x: model(*x), model, ids, *packing)
        for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(our, their, rtol=1e-10, atol=1e-10)


def test_windows_in_float32(mesh: jax.sharding.Mesh) -> None:
    """No further from float64 than the whole, twice."""
    ids, segments = drawn_sequences(16)
    options: dict[str, Any] = dict(rotary_emb=True, layers="gate_loop,attention", depth=2)
    exact = windowed(6, **options)(ids, segments)
    model = windowed(6, "float32", **options)
    ours = over_axis(mesh)(model, ids, segments)
    assert ours.dtype == jnp.float32
    error, whole = (channel_errors(x, exact) for x in (ours, model(ids, segments)))
    assert (error <= 2 * whole.max()).all()


def test_windows_over_two_axes() -> None:
    """That shard time together, or rows and time."""
    mesh = jax.make_mesh((2, 2), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)
    model = windowed(7, rotary_emb=True)
    ids, segments = drawn_sequences(16)
    whole = model(ids, segments)
    for blocks in (over_axis(mesh, ("outer", "inner")), over_axis(mesh, "inner", rows="outer")):
        np.testing.assert_allclose(blocks(model, ids, segments), whole, atol=1e-10)


def test_windows_of_no_steps(mesh: jax.sharding.Mesh) -> None:
    nothing = jnp.zeros((2, 0), int)
    assert over_axis(mesh)(windowed(3, rotary_emb=True), nothing, nothing).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("window", "time", "sent"), [(1, 16, []), (3, 16, [2]), (6, 16, [4, 1]), (99, 8, [2, 2, 2])]
)
def test_a_window_of_keys_and_values_travels(
    window: int, time: int, sent: list[int], mesh: jax.sharding.Mesh
) -> None:
    """Of two heads of four channels, whatever T is; nothing else without segments."""
    call = over_axis(mesh, packed=False)
    for steps in (time, 100 * time if window < time // 4 else time):
        program = str(jax.make_jaxpr(call)(windowed(window), jnp.zeros((2, steps), int)))
        found = re.findall(r"f64\[([\d,]+)\]\S* = (all_\w+|p\w*sum\w*|ppermute)\[", program)
        assert found == [(f"2,4,{count},4", "ppermute") for count in sent]


def test_what_attention_over_an_axis_refuses() -> None:
    ids = jnp.zeros((2, 4), int)
    with pytest.raises(ValueError, match="Attention: axis_name must be None for attention without"):
        windowed(None)(ids, axis_name="time")
    with pytest.raises(
        ValueError, match=r"Attention: mask must be None .* got one of shape \(2, 4"
    ):
        windowed(3)(ids, mask=jnp.ones((2, 4), bool), axis_name="time")


@pytest.mark.parametrize("way", ["kernel", "blocks"])
def test_products_of_blocks_keep_their_accuracy(
    way: str, mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, of transitions near 1: by blocks rounded factor by factor they were off by 3e-5.
    The kernel rounds at every step."""
    # Traced anew: jax.jit keeps a function's programs by shapes.
    read: Any = partial(inspect.unwrap(gate_loop), axis_name="time")
    if way == "blocks":
        monkeypatch.setattr(
            _wide_heads, "bind", lambda _, *x, **o: _wide_heads._definition(*x, **o)
        )
    time, u = 40000, 1e-5
    k = jnp.zeros((1, time, 1, 1), "float32")
    a = jnp.full((1, time, 1), 1 - u, "float32")
    by_time = P(None, "time")
    call = jax.shard_map(
        lambda k, a, state: read(k + 1, k, k, a, state),
        mesh=mesh,
        in_specs=(by_time, by_time, P()),
        out_specs=(by_time, P()),
    )
    y, final = jax.jit(call)(k, a, jnp.ones((1, 1, 1, 1), "float32"))
    exact = np.float64(a[0, 0, 0]) ** np.arange(1, time + 1)
    tolerance = 1e-6 if way == "blocks" else time * 2**-25  # half a unit in the last place a step
    np.testing.assert_allclose(y.ravel(), exact, rtol=tolerance)
    np.testing.assert_allclose(final.ravel(), exact[-1:], rtol=tolerance)
