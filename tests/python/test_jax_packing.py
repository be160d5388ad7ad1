"""Packed and padded sequences in gateloop_jax, and heads wider than one channel."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import thinned
from drawn_models import drawn_ids, drawn_model
from jax import Array

from gateloop_cpp import checkpoint, ops
from gateloop_jax import (
    gate_loop,
    gate_loop_step,
    linear_recurrence,
    load_checkpoint,
    polar_gate_loop,
    simple_gate_loop,
)

# Sequence lengths of a row, and what they are numbered by: a number may come back.
LENGTHS, NUMBERS = (5, 1, 7, 2), (3, 0, 3, 9)
SEGMENTS = np.repeat(NUMBERS, LENGTHS)
TIME = len(SEGMENTS)
MASK = np.array([1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1], bool)
CLOSE: Any = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def drawn(*shape: int, is_complex: bool = False) -> Array:
    rng = np.random.default_rng(len(shape) + sum(shape))
    x = rng.standard_normal((1, *shape))
    return jnp.asarray(x + 1j * rng.standard_normal(x.shape) if is_complex else x)


def transitions(*shape: int) -> Array:
    a = drawn(*shape, is_complex=True)
    return a / jnp.abs(a) * (1 - jnp.abs(drawn(*shape)) / 10)


Function = Callable[..., tuple[Array, Array]]
# The function, its sequences, and the shape of a state.
CASES: dict[str, tuple[Function, Callable[[], tuple[Array, ...]], tuple[int, ...]]] = {
    "linear": (
        linear_recurrence,
        lambda: (transitions(TIME, 3), drawn(TIME, 3, is_complex=True)),
        (3,),
    ),
    "max heads": (
        gate_loop,
        lambda: (drawn(TIME, 3), drawn(TIME, 3), drawn(TIME, 3), transitions(TIME, 3)),
        (3,),
    ),
    "polar": (
        polar_gate_loop,
        lambda: (drawn(TIME, 3), drawn(TIME, 3), drawn(TIME, 3), drawn(TIME, 6)),
        (3,),
    ),
    "simple": (
        partial(simple_gate_loop, normalize_input=True),
        lambda: (drawn(TIME, 3), drawn(TIME, 3), drawn(TIME, 3) / 3),
        (3,),
    ),
    "heads": (
        gate_loop,
        lambda: (drawn(TIME, 2, 3), drawn(TIME, 2, 3), drawn(TIME, 2, 4), transitions(TIME, 2)),
        (2, 3, 4),
    ),
    "per key": (
        gate_loop,
        lambda: (drawn(TIME, 2, 3), drawn(TIME, 2, 3), drawn(TIME, 2, 4), transitions(TIME, 2, 3)),
        (2, 3, 4),
    ),
    "taylor": (
        partial(gate_loop, feature_map="taylor"),
        lambda: (drawn(TIME, 2, 3), drawn(TIME, 2, 3), drawn(TIME, 2, 4), transitions(TIME, 2)),
        (2, 10, 4),
    ),
}


@pytest.mark.parametrize(
    ("name", "reverse", "masked"),
    [
        ("linear", False, False),
        ("linear", True, True),
        ("max heads", False, True),
        ("polar", True, False),
        ("polar", False, True),
        ("heads", True, True),
        ("per key", False, False),
        ("taylor", True, False),
    ],
)
def test_packed_equals_each_alone(name: str, reverse: bool, masked: bool) -> None:
    function, make, state_shape = CASES[name]
    sequences, state = make(), drawn(*state_shape, is_complex=True)
    segments = jnp.asarray(SEGMENTS)[None]
    mask = jnp.asarray(MASK)[None]

    def packed(state: Array, *sequences: Array) -> tuple[Array, Array]:
        given: dict[str, Any] = dict(segment_ids=segments)
        if masked:
            given["mask"] = mask
            sequences = tuple(
                jnp.where(mask.reshape(1, TIME, *[1] * (s.ndim - 2)), s, jnp.nan) for s in sequences
            )
        return function(*sequences, state, reverse, **given)

    def alone(state: Array, *sequences: Array) -> tuple[Array, Array]:
        ends = np.cumsum(LENGTHS)
        parts: list[Array] = [jnp.zeros(())] * len(ends)
        order = range(len(ends))
        for i in reversed(order) if reverse else order:
            steps = np.arange(ends[i] - LENGTHS[i], ends[i])
            kept = steps[MASK[steps]] if masked else steps
            mine = [s[:, kept] for s in sequences]
            y, state = function(*mine, state, reverse)
            whole = jnp.zeros((1, len(steps), *y.shape[2:]), y.dtype)
            parts[i] = whole.at[:, kept - steps[0]].set(y)
            final, state = state, jnp.zeros_like(state)
        return jnp.concatenate(parts, 1), final

    def gradients_and_values(f: Function) -> Callable[..., Any]:
        def loss(*given: Array) -> tuple[Array, tuple[Array, Array]]:
            results = f(*given)
            return sum(jnp.sum(jnp.abs(r) ** 2 + jnp.real(r)) for r in results), results  # type: ignore[return-value]

        return jax.grad(loss, argnums=tuple(range(1 + len(sequences))), has_aux=True)

    our_gradients, our_values = gradients_and_values(packed)(state, *sequences)
    # As one program: operation by operation XLA compiles every length on its own.
    their_gradients, their_values = jax.jit(gradients_and_values(alone))(state, *sequences)
    for ours, theirs in zip(our_values, their_values, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        assert jnp.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize("normalize_input", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_simple_gate_loop_is_that_of_torch(normalize_input: bool, reverse: bool) -> None:
    given = (drawn(TIME, 3), drawn(TIME, 3) / 2, drawn(TIME, 3) / 3, drawn(3))
    by_torch: Any = ops.simple_gate_loop
    by_us: Any = simple_gate_loop
    tensors = [torch.from_numpy(np.array(x)) for x in given]
    mask = torch.from_numpy(MASK[None])
    theirs = by_torch(*tensors, reverse, normalize_input, mask=mask)
    ours = by_us(*given, reverse, normalize_input, mask=MASK[None])
    for x, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, expected.numpy(), **CLOSE)
    with pytest.raises(TypeError, match="simple_gate_loop: z must be float64 as q is, got float32"):
        by_us(*given[:2], given[2].astype("float32"))


@pytest.mark.parametrize("name", ["max heads", "heads", "per key", "taylor"])
def test_steps_are_the_gate_loop(name: str) -> None:
    _, make, state_shape = CASES[name]
    (q, k, v, a), state = make(), drawn(*state_shape, is_complex=True)
    options: Any = dict(feature_map="taylor" if name == "taylor" else "none")
    y, final = gate_loop(q, k, v, a, state, **options)
    for t in range(TIME):
        y_t, state = gate_loop_step(q[:, t], k[:, t], v[:, t], a[:, t], state, **options)
        np.testing.assert_allclose(y_t, y[:, t], **CLOSE)
    np.testing.assert_allclose(state, final, **CLOSE)


@pytest.mark.parametrize("name", ["heads", "per key", "taylor"])
@pytest.mark.parametrize("reverse", [False, True])
def test_heads_are_those_of_torch(name: str, reverse: bool) -> None:
    function, make, state_shape = CASES[name]
    given = (*make(), drawn(*state_shape, is_complex=True))
    by_torch: Any = ops.gate_loop
    tensors = [torch.from_numpy(np.array(x)) for x in given]
    feature_map = "taylor" if name == "taylor" else "none"
    theirs = by_torch(*tensors, reverse, feature_map=feature_map)
    for ours, expected in zip(function(*given, reverse), theirs, strict=True):
        np.testing.assert_allclose(ours, expected.numpy(), **CLOSE)
    tangents = jax.jvp(lambda *x: function(*x, reverse), given, given)[1]
    assert all(jnp.isfinite(t).all() for t in tangents)


@pytest.mark.parametrize(("seed", "masked"), thinned(product(range(8), [False, True]), 3))
def test_packed_models_are_those_of_torch(seed: int, masked: bool, tmp_path: Any) -> None:
    theirs = drawn_model(seed)
    checkpoint.save(theirs, tmp_path)
    theirs.double()
    stored = load_checkpoint(tmp_path)
    ours = eqx.filter_jit(jax.tree.map(lambda w: jnp.asarray(np.float64(w)), stored))
    ids = drawn_ids(seed)
    time = ids.shape[1]
    if masked:
        mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        expected = theirs(ids, mask=mask)[mask]
        got = ours(ids.numpy(), mask=mask.numpy())[mask.numpy()]
    else:
        cuts = torch.tensor([0, 3, 4, time])
        expected = theirs(ids[:1], cu_seqlens=cuts)
        got = ours(ids[:1].numpy(), segment_ids=np.repeat([4, 1, 4], np.diff(cuts))[None])
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-8, atol=1e-8)
    if not masked:
        alone = ours(ids[0].numpy(), segment_ids=np.repeat([4, 1, 4], np.diff(cuts)))
        np.testing.assert_allclose(alone, got[0], **CLOSE)


def test_what_does_not_fit_is_refused() -> None:
    q = drawn(4, 3)
    with pytest.raises(ValueError, match=r"segment_ids must be integers of shape \(1, 4\), got"):
        polar_gate_loop(q, q, q, drawn(4, 6), segment_ids=jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(1, 4\), got bool of shape"):
        linear_recurrence(q, q, mask=jnp.ones(4, bool))
    heads, a = drawn(4, 2, 3), transitions(4, 2)
    with pytest.raises(ValueError, match=r"k must be \(1, 4, 2, 3\) to go with q"):
        gate_loop(heads, heads[..., :2], heads, a)
    for v in (heads[..., 0], heads[..., 0, 0]):
        with pytest.raises(ValueError, match=r"gate_loop: v must be \(B, T, H, V\), got"):
            gate_loop(heads, heads, v, a)
    with pytest.raises(ValueError, match=r"initial_state must be \(B, H, K, V\) = \(1, 2, 3"):
        gate_loop(heads, heads, heads, a, a)
    with pytest.raises(TypeError, match="initial_state must be complex128 as a is, got float64"):
        gate_loop(heads, heads, heads, a, jnp.zeros((1, 2, 3, 3)))
    with pytest.raises(ValueError, match=r"q must be \(B, T, D\) or \(B, T, H, K\), got"):
        gate_loop(q[0], q, q, q)
    with pytest.raises(ValueError, match='feature_map must be "none" without heads'):
        gate_loop(q, q, q, transitions(4, 3), feature_map="taylor")
