"""gateloop_jax.bidirectional: both directions run by hand, each sequence alone, and torch's."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array

from gateloop_cpp import ops
from gateloop_jax import bidirectional, gate_loop, linear_recurrence, polar_gate_loop

TIME, WIDTH = 21, 3
CUTS = (0, 5, 6, 21)
SEGMENTS = np.repeat([4, 1, 4], np.diff(CUTS))[None]
CLOSE: Any = dict(rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def drawn(name: str) -> tuple[Any, Any, Any, Any]:
    """The function, sequences of either direction, initial states of either."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, is_complex: bool = False) -> Array:
        x = rng.standard_normal(shape)
        return jnp.asarray(x + 1j * rng.standard_normal(shape) if is_complex else x)

    def sequences() -> tuple[Array, ...]:
        shape = (1, TIME, WIDTH)
        a = normal(*shape, is_complex=True)
        a = 0.9 * a / jnp.abs(a)
        if name == "linear":
            return a, normal(*shape, is_complex=True)
        if name == "polar":
            return *(normal(*shape) for _ in "qkv"), normal(1, TIME, 2 * WIDTH)
        if name == "heads":
            return *(normal(1, TIME, WIDTH, 2) for _ in "qk"), normal(1, TIME, WIDTH, 4), a
        return *(normal(*shape) for _ in "qkv"), a

    scan = {"linear": linear_recurrence, "polar": polar_gate_loop}.get(name, gate_loop)
    state = partial(normal, 1, WIDTH, *([2, 4] if name == "heads" else []), is_complex=True)
    return scan, sequences(), sequences(), (state(), state())


NAMES = pytest.mark.parametrize("name", ["linear", "gate", "polar", "heads"])


def assert_close(ours: Any, theirs: Any) -> None:
    for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(our, their, **CLOSE)


@NAMES
def test_is_the_sum_of_both_directions(name: str) -> None:
    scan, forward, backward, states = drawn(name)

    def by_hand(forward: Any, backward: Any, states: Any) -> Any:
        y, last = scan(*forward, states[0])
        other, first = scan(*backward, states[1], True)
        return y + other, (last, first)

    def values_and_gradients(f: Any) -> Any:
        outputs, back = jax.vjp(f, forward, backward, states)
        return outputs, back(outputs)

    ours = values_and_gradients(partial(bidirectional, scan))
    assert_close(ours, values_and_gradients(by_hand))
    same, _ = bidirectional(scan, forward)
    assert_close(same, scan(*forward)[0] + scan(*forward, reverse=True)[0])


@NAMES
def test_is_that_of_torch(name: str) -> None:
    scan, *given = drawn(name)
    tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), given)
    theirs = ops.bidirectional(getattr(ops, scan.__name__), *tensors)
    assert_close(bidirectional(scan, *given), jax.tree.map(lambda t: t.numpy(), theirs))


@NAMES
def test_packed_sequences_are_as_each_alone(name: str) -> None:
    scan, forward, backward, states = drawn(name)
    y, finals = bidirectional(scan, forward, backward, states, segment_ids=SEGMENTS)
    count = len(CUTS) - 1
    ends: list[Any] = []
    for n in range(count):
        mine = [tuple(t[:, CUTS[n] : CUTS[n + 1]] for t in ts) for ts in (forward, backward)]
        initial = (states[0] if n == 0 else None, states[1] if n == count - 1 else None)
        alone, mine_finals = bidirectional(scan, mine[0], mine[1], initial)
        assert_close(y[:, CUTS[n] : CUTS[n + 1]], alone)
        ends.append(mine_finals)
    assert_close(finals, (ends[-1][0], ends[0][1]))


@NAMES
def test_padding_is_as_if_left_out(name: str) -> None:
    scan, forward, backward, states = drawn(name)
    mask = np.random.default_rng(1).random((1, TIME)) < 0.6
    y, finals = bidirectional(scan, forward, backward, states, mask=mask)
    kept = [tuple(t[:, mask[0]] for t in ts) for ts in (forward, backward)]
    assert_close((y[:, mask[0]], finals), bidirectional(scan, kept[0], kept[1], states))
    assert (y[:, ~mask[0]] == 0).all()


def test_names_what_does_not_fit() -> None:
    scan, forward, _, _ = drawn("linear")
    options: Any = {"reverse": True, "initial_state": None}
    for name, option in options.items():
        with pytest.raises(ValueError, match=f"bidirectional: {name} must not be given"):
            bidirectional(scan, forward, **{name: option})
    wrong: Any = {"tuple of 1": (None,), "NoneType": None, type(forward[0]).__name__: forward[0]}
    for got, states in wrong.items():
        with pytest.raises(ValueError, match=f"initial_states must be a tuple of two.* got {got}$"):
            bidirectional(scan, forward, initial_states=states)
    # Shapes that a sum would broadcast.
    first = tuple(x[:, :1] for x in forward)
    with pytest.raises(ValueError, match=r"backward must .* \(1, 21, 3\), got \(1, 1, 3\)"):
        bidirectional(scan, forward, first)
