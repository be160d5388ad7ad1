"""States of every sequence of a row in gateloop_jax: num_segments."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from channels import assert_near
from conftest import thinned
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_jax_packing import CASES as FUNCTIONS
from test_jax_packing import CLOSE, TIME, Function
from test_jax_packing import double as double

import gateloop_jax
from gateloop_cpp import ops
from gateloop_jax import GateLoopTransformer, bidirectional

gate_loop: Any = gateloop_jax.gate_loop  # of lists of arguments
COUNT = 5
# Numbers that come back, that have no steps, and that are of no state.
ROWS = np.stack(
    [np.repeat([3, 0, 3, 4], [5, 1, 7, 2]), np.repeat([-1, 2, 9, 1, 2], [2, 6, 1, 2, 4])]
)
MASK = np.random.default_rng(0).random(ROWS.shape) > 0.3


def arguments(name: str) -> tuple[Callable[..., Any], list[Array], Array]:
    """The function, two rows of sequences, and states (2, COUNT, ...)."""
    function, make, state_shape = FUNCTIONS[name]
    sequences = [jnp.concatenate([x, x[:, ::-1]]) for x in make()]
    rng = np.random.default_rng(1)
    shape = (2, COUNT, *state_shape)
    state = rng.standard_normal(shape)
    is_complex = any(jnp.iscomplexobj(x) for x in sequences) or name == "polar"
    return (
        function,
        sequences,
        jnp.asarray(state + 1j * rng.standard_normal(shape) if is_complex else state),
    )


def one_by_one(
    function: Function, reverse: bool, mask: Any, states: Array, sequences: list[Array]
) -> tuple[Array, Array]:
    """Of two rows, without padding."""
    ys = []
    for b, ids in enumerate(ROWS):
        cuts = [0, *(np.flatnonzero(np.diff(ids)) + 1), TIME]
        runs = list(pairwise(cuts))
        parts: dict[int, Array] = {}
        initial = states
        for begin, end in reversed(runs) if reverse else runs:
            steps = np.arange(begin, end)
            kept = steps if mask is None else steps[mask[b, begin:end]]
            n = ids[begin]
            state = initial[b, n] if 0 <= n < COUNT else jnp.zeros_like(initial[b, 0])
            y, state = function(*(x[b : b + 1, kept] for x in sequences), state[None], reverse)
            whole = jnp.zeros((len(steps), *y.shape[2:]), y.dtype)
            parts[begin] = whole.at[kept - begin].set(y[0])
            if 0 <= n < COUNT:
                states = states.at[b, n].set(state[0])
        ys.append(jnp.concatenate([parts[begin] for begin, _ in runs]))
    return jnp.stack(ys), states


def with_gradients(f: Callable[..., Any], *given: Any) -> Any:
    def loss(*given: Any) -> Any:
        results = f(*given)
        total = sum(jnp.sum(jnp.abs(r) ** 2 + jnp.sin(jnp.real(r))) for r in results)
        return total, results

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*given)


def assert_close(ours: Any, theirs: Any, **tolerance: Any) -> None:
    for x, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == expected.shape and x.dtype == expected.dtype
        np.testing.assert_allclose(x, expected, **(tolerance or CLOSE))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_states_equal_sequences_one_by_one(name: str, reverse: bool, masked: bool) -> None:
    function, sequences, states = arguments(name)
    mask = MASK if masked else None

    def packed(states: Array, sequences: list[Array]) -> Any:
        options: Any = dict(segment_ids=ROWS, mask=mask, num_segments=COUNT)
        return function(*sequences, states, reverse, **options)

    alone = partial(one_by_one, function, reverse, mask)
    assert_close(*(with_gradients(f, states, sequences) for f in (packed, alone)))


WAYS = thinned(product(FUNCTIONS, [False, True], [False, True]), 3)


@pytest.mark.parametrize(("name", "reverse", "masked"), WAYS)
def test_blocks_of_time_equal_the_whole(name: str, reverse: bool, masked: bool) -> None:
    """Inside shard_map: sequences end in blocks and between them."""
    function, sequences, states = arguments(name)
    mesh = jax.make_mesh((3,), ("time",), axis_types=(AxisType.Auto,))
    packing = dict(segment_ids=ROWS) | (dict(mask=MASK) if masked else {})
    options: Any = dict(reverse=reverse, num_segments=COUNT)

    def block(states: Array, sequences: list[Array], packing: dict[str, Any]) -> Any:
        return function(*sequences, states, axis_name="time", **packing, **options)

    by_time = P(None, "time")
    sharded = jax.shard_map(
        block, mesh=mesh, in_specs=(P(), by_time, by_time), out_specs=(by_time, P())
    )

    def whole(states: Array, sequences: list[Array]) -> Any:
        return function(*sequences, states, **packing, **options)

    def blocks(states: Array, sequences: list[Array]) -> Any:
        return sharded(states, sequences, packing)

    assert_close(*(with_gradients(f, states, sequences) for f in (blocks, whole)))


@pytest.mark.parametrize(
    ("name", "kind", "axis"),
    thinned(product(["linear", "heads", "taylor"], [AxisType.Explicit, AxisType.Auto], [0, 2]), 2),
)
def test_sharded_along_batch_or_channels(name: str, kind: AxisType, axis: int) -> None:
    function, sequences, states = arguments(name)
    if name == "linear":
        sequences, states = [x[..., :2] for x in sequences], states[..., :2]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    call = with_gradients_of(function)
    expected = call(states, sequences, ROWS)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(*[None] * axis, "x"))
        put = jax.device_put(sequences, sharding)
        ids = jax.device_put(ROWS, NamedSharding(mesh, P("x" if axis == 0 else None)))
        got = call(states, put, ids)
    assert_close(jax.device_get(got), expected)


def with_gradients_of(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(states: Array, sequences: list[Array], ids: Any) -> Any:
        def f(states: Array, sequences: list[Array]) -> Any:
            return function(*sequences, states, segment_ids=ids, num_segments=COUNT)

        return with_gradients(f, states, sequences)

    return call


@pytest.mark.parametrize("name", thinned(FUNCTIONS, 2))
def test_vmap_over_states_and_sequences(name: str) -> None:
    function, sequences, states = arguments(name)
    options: Any = dict(segment_ids=ROWS, num_segments=COUNT)
    many, first = jnp.stack([states, -states, 0 * states]), sequences[0]
    calls: Any = jax.vmap(lambda s, x: function(x, *sequences[1:], s, **options))
    got = calls(many, jnp.stack([first, first / 2, first]))
    for i, x in enumerate((first, first / 2, first)):
        expected = function(x, *sequences[1:], many[i], **options)
        assert_close([r[i] for r in got], expected, rtol=1e-12, atol=1e-12)


# As cu_seqlens of torch: sequences one after the other, the second and the last two empty.
LENGTHS = (700, 0, 1, 64, 130, 33, 0, 0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("linear", "float64"),
        ("max heads", "float32"),
        ("max heads", "bfloat16"),
        ("polar", "float64"),
        ("polar", "float16"),
        ("simple", "bfloat16"),
        ("heads", "float64"),
        ("heads", "float32"),
        ("heads", "bfloat16"),
        ("per key", "float64"),
        ("taylor", "float32"),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_states_are_those_of_torch(name: str, dtype: str, reverse: bool) -> None:
    count, time = len(LENGTHS), sum(LENGTHS)
    ours: Callable[..., Any]
    ours, make, state_shape = FUNCTIONS[name]
    theirs: Any = {
        "linear": ops.linear_recurrence,
        "polar": ops.polar_gate_loop,
        "simple": partial(ops.simple_gate_loop, normalize_input=True),
        "taylor": partial(ops.gate_loop, feature_map="taylor"),
    }.get(name, ops.gate_loop)
    rng = np.random.default_rng(2)
    wide = "float64" if dtype == "float64" else "float32"

    def drawn(like: Array) -> Array:
        x = rng.standard_normal((1, time, *like.shape[2:]))
        if not jnp.iscomplexobj(like):
            return jnp.asarray(x, dtype)
        x = np.exp(1j * x) * (1 - rng.random(x.shape) ** 4 / 2)
        return jnp.asarray(x, jnp.promote_types(wide, "complex64"))

    sequences = [drawn(x) for x in make()]
    is_complex = name == "polar" or any(jnp.iscomplexobj(x) for x in sequences)
    drawn_states: Any = rng.standard_normal((count, *state_shape))
    states = jnp.asarray(drawn_states, jnp.promote_types(wide, "complex64") if is_complex else wide)
    ids = np.repeat(np.arange(count), LENGTHS)[None]
    options: Any = dict(segment_ids=ids, num_segments=count)
    got = jax.jit(lambda *x: ours(*x, reverse, **options))(*sequences, states[None])
    assert got[1].shape == (1, count, *state_shape) and got[0].dtype == sequences[0].dtype

    def tensor(x: Any) -> torch.Tensor:
        exact = x.astype(jnp.promote_types(x.dtype, "float64"))
        return torch.from_numpy(np.array(exact))

    cuts = torch.from_numpy(np.cumsum([0, *LENGTHS]))
    y, final = theirs(*map(tensor, (*sequences, states)), reverse, cu_seqlens=cuts)
    empty = np.equal(LENGTHS, 0)
    np.testing.assert_array_equal(got[1][0, empty], states[empty])
    # Half precision is storage: y is rounded once. Rounding is 6e-8, and 1e-16; a state sums
    # some hundred terms.
    unit = {"bfloat16": 2**-8, "float16": 2**-11}.get(dtype, 0)
    sums = 1e-5 if wide == "float32" else 1e-12
    for our, their, rounding in ((got[0], y, unit), (got[1][0], final, 0)):
        assert_near(our, their, sums, relative=rounding)


def test_no_step_of_heads_has_a_state_in_memory() -> None:
    time, width, count = 2048, 32, 16
    q = jnp.ones((1, time, 1, width))
    ids = jnp.arange(time)[None] // (time // count)
    states = jnp.ones((1, count, 1, width, width), complex)

    def both(a: Array, states: Array, *x: Array) -> Any:
        def loss(a: Array, states: Array, *x: Array) -> Array:
            y, final = gate_loop(*x, a, states, segment_ids=ids, num_segments=count)
            return jnp.sum(y) + jnp.sum(final.real)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(a, states, *x)

    given = (jnp.ones(q.shape[:3], complex), states, q, q, q)
    memory: Any = jax.jit(both).lower(*given).compile().memory_analysis()
    # In float64 all states would be 32 MiB.
    assert memory.temp_size_in_bytes < 16 * time * width * width / 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_steps_leave_the_states(name: str) -> None:
    function, sequences, states = arguments(name)
    options: Any = dict(segment_ids=ROWS[:, :0], num_segments=COUNT)
    y, final = function(*(x[:, :0] for x in sequences), states, **options)
    assert y.shape[:2] == (2, 0)
    np.testing.assert_array_equal(final, states)


@pytest.mark.parametrize(("dtype", "count"), [("int8", 128), ("uint8", 256), ("uint8", 300)])
def test_small_integers_number_many_segments(double: None, dtype: str, count: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, (2, 30))
    a, x = rng.random((2, 30, 3)), rng.standard_normal((2, 30, 3))
    states = rng.standard_normal((2, count, 3))
    given = [
        gateloop_jax.linear_recurrence(a, x, states, segment_ids=i, num_segments=count)
        for i in (jnp.asarray(ids, dtype), jnp.asarray(ids))
    ]
    for ours, theirs in zip(*given, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["max heads", "heads", "per key", "taylor"])
def test_states_of_other_numbers_may_be_anything(name: str) -> None:
    function, sequences, states = arguments(name)
    options: dict[str, Any] = dict(segment_ids=ROWS, num_segments=COUNT)
    expected, _ = function(*sequences, states, **options)
    spoilt = states.at[0, 2].set(jnp.nan).at[1, 0].set(jnp.inf)  # of numbers without steps
    y, final = function(*sequences, spoilt, **options)
    np.testing.assert_array_equal(y, expected)
    assert bool(jnp.isnan(final[0, 2]).all()) and bool(jnp.isfinite(final[0, 3]).all())


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 5, 0, 3)], ids=["B", "H"])
def test_states_of_no_numbers(shape: tuple[int, ...]) -> None:
    q = jnp.zeros(shape)
    ids = jnp.zeros(shape[:2], int)
    y, final = gate_loop(q, q, q, q[..., 0], segment_ids=ids, num_segments=3)
    assert (y.shape, final.shape) == (shape, (shape[0], 3, *shape[2:], shape[3]))


@pytest.mark.parametrize("form", ["auto", "attention"])
def test_heads_are_exported_for_every_length(form: str) -> None:
    def f(q: Array, a: Array, ids: Array) -> Any:
        return gate_loop(q, q, q, a, form=form, segment_ids=ids, num_segments=2)

    batch, time = jax.export.symbolic_shape("b, t")
    shapes = [
        jax.ShapeDtypeStruct((batch, time, 2, 3), jnp.float32),
        jax.ShapeDtypeStruct((batch, time, 2), jnp.float32),
        jax.ShapeDtypeStruct((batch, time), jnp.int32),
    ]
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(f"gateloop_{call}")
        for call in ("gate_loop", "linear_recurrence")
    ]
    exported = jax.export.export(jax.jit(f), disabled_checks=checks)(*shapes)
    rng = np.random.default_rng(0)
    q, a = rng.standard_normal((1, 70, 2, 3), np.float32), rng.random((1, 70, 2), np.float32)
    given = (q, a, np.repeat([0, 1], [3, 67])[None].astype(np.int32))
    for ours, theirs in zip(exported.call(*given), f(*map(jnp.asarray, given)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_both_directions_take_states_of_each() -> None:
    function, sequences, states = arguments("max heads")
    options: Any = dict(segment_ids=ROWS, num_segments=COUNT)
    y, finals = bidirectional(function, sequences, None, (states, -states), **options)
    there = function(*sequences, states, **options)
    back = function(*sequences, -states, True, **options)
    assert_close((y, finals), (there[0] + back[0], (there[1], back[1])))


def test_what_does_not_fit_is_refused() -> None:
    _, (a, x), states = arguments("linear")
    call: Any = gateloop_jax.linear_recurrence
    with pytest.raises(ValueError, match="linear_recurrence: num_segments must be None without"):
        call(a, x, num_segments=3)
    with pytest.raises(ValueError, match="num_segments must be at least 1, got 0"):
        call(a, x, segment_ids=ROWS, num_segments=0)
    with pytest.raises(TypeError, match=r"num_segments must be an int, got 3\.0"):
        call(a, x, segment_ids=ROWS, num_segments=3.0)
    with pytest.raises(ValueError, match=r"initial_state must be \(B, N, D\) = \(2, 5, 3\), got"):
        call(a, x, states[:, 0], segment_ids=ROWS, num_segments=COUNT)
    _, heads, states = arguments("heads")
    with pytest.raises(ValueError, match=r"must be \(B, N, H, K, V\) = \(2, 5, 2, 3, 4\), got"):
        gate_loop(*heads, states[:, 0], segment_ids=ROWS, num_segments=COUNT)


@pytest.mark.parametrize(
    "options",
    [
        dict(heads=2, simple_gate_loop=True),
        dict(gate_loop_heads=2, gate="magnitude_phase"),
    ],
    ids=["max heads", "wider heads"],
)
def test_models_carry_the_states_of_each(options: dict[str, Any]) -> None:
    model = GateLoopTransformer(11, 8, 1, jax.random.key(0), architecture="pytorch", **options)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 11, ROWS.shape))
    rows = np.where((ROWS >= 0) & (ROWS < COUNT), ROWS, COUNT)
    states = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype),
        model.initial_state(2, num_segments=COUNT + 1),
    )
    of_each: dict[tuple[int, int], Any] = {}
    expected = []
    for b, row in enumerate(rows):
        cuts = [0, *(np.flatnonzero(np.diff(row)) + 1), TIME]
        for begin, end in pairwise(cuts):
            key = b, int(row[begin])
            before = jax.tree.map(lambda s, key=key: s[key], states)
            logits, of_each[key] = model.advance(ids[b, begin:end], before)
            expected.append(logits)
    logits, after = model.advance(ids, states, rows, num_segments=COUNT + 1)
    np.testing.assert_allclose(logits.reshape(-1, 11), jnp.concatenate(expected), atol=2e-5)
    for b, n in product(range(2), range(COUNT + 1)):
        left = of_each.get((b, n), jax.tree.map(lambda s: s[b, n], states))  # noqa: B023
        assert_close(jax.tree.map(lambda s: s[b, n], after), left, atol=2e-5)  # noqa: B023
    alone = model.advance(ids[0], jax.tree.map(lambda s: s[0], states), rows[0], None, COUNT + 1)
    assert_close(alone, jax.tree.map(lambda s: s[0], (logits, after)), atol=1e-6)


def test_attention_carries_no_states_of_packed_sequences() -> None:
    options: Any = dict(architecture="pytorch", layers="attention", heads=2, window=4)
    model = GateLoopTransformer(11, 8, 1, jax.random.key(0), **options)
    state = model.initial_state(2, num_segments=COUNT)
    with pytest.raises(ValueError, match="Attention: state must be None with segment_ids, mask"):
        model.advance(jnp.zeros(ROWS.shape, int), state, ROWS, num_segments=COUNT)
