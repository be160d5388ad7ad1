"""gateloop_cpp.ops.bidirectional: both directions run by hand, and their definition."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_ops import FORWARD_CASES, Case, differentiable, inputs
from torch import Tensor

from gateloop_cpp import ops

CUTS = torch.tensor([0, 0, 15, 32, 49, 52])


def both(case: Case, batch: int, time: int, states: int) -> tuple[Any, ...]:
    """The function, sequences of either direction, initial states of either."""
    forward = inputs(case, batch, time, 3)
    backward = tuple(t.flip(0, 1) * 0.9 for t in forward)
    given = [differentiable(ts[:-1]) for ts in (forward, backward)]
    initial = [inputs(case, states, 1, 3)[-1] * scale for scale in (1, -2)]
    return getattr(ops, case.op), *given, differentiable(tuple(initial))


def gradients(y: Tensor, finals: Any, leaves: Any) -> tuple[Tensor, ...]:
    weights = torch.arange(y.numel()).cos().view_as(y)
    loss = (y * weights).abs().sum() + sum((f * (i + 1)).abs().sum() for i, f in enumerate(finals))
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_is_the_sum_of_both_directions(case: Case) -> None:
    scan, forward, backward, states = both(case, 2, 37, 2)
    y, finals = ops.bidirectional(scan, forward, backward, states)
    by_hand, last = scan(*forward, states[0])
    other, first = scan(*backward, states[1], reverse=True)
    torch.testing.assert_close((y, *finals), (by_hand + other, last, first), rtol=0, atol=0)
    leaves = (*forward, *backward, *states)
    torch.testing.assert_close(
        gradients(y, finals, leaves), gradients(by_hand + other, (last, first), leaves)
    )
    same, _ = ops.bidirectional(scan, forward)
    torch.testing.assert_close(same, scan(*forward)[0] + scan(*forward, reverse=True)[0])


def test_every_step_reads_the_others_once_and_itself_twice() -> None:
    torch.manual_seed(0)
    time, heads, keys, values = 9, 2, 3, 4
    q, k = torch.randn(2, 1, time, heads, keys, dtype=torch.float64)
    v = torch.randn(1, time, heads, values, dtype=torch.float64)
    ahead, back = torch.rand(2, 1, time, heads, dtype=torch.float64)
    y, _ = ops.bidirectional(ops.gate_loop, (q, k, v, ahead), (q, k, v, back), mask=None)
    expected = torch.zeros_like(v)
    for t in range(time):
        for s in range(time):
            decay = ahead[:, s + 1 : t + 1].prod(1) if s < t else back[:, t:s].prod(1)
            times = 2 if s == t else 1
            score = (q[:, t] * k[:, s]).sum(-1) * decay * times
            expected[:, t] += score[..., None] * v[:, s]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_packed_sequences_are_as_each_alone(case: Case) -> None:
    scan, forward, backward, states = both(case, 1, int(CUTS[-1]), len(CUTS) - 1)
    y, finals = ops.bidirectional(scan, forward, backward, states, cu_seqlens=CUTS)
    alone = []
    for n, (begin, end) in enumerate(zip(CUTS[:-1].tolist(), CUTS[1:].tolist(), strict=True)):
        mine = [tuple(t[:, begin:end] for t in ts) for ts in (forward, backward)]
        mine_states = (states[0][n : n + 1], states[1][n : n + 1])
        alone.append(ops.bidirectional(scan, mine[0], mine[1], mine_states))
    expected = torch.cat([one[0] for one in alone], 1)
    expected_finals = tuple(torch.cat([one[1][i] for one in alone]) for i in range(2))
    torch.testing.assert_close((y, finals), (expected, expected_finals))
    leaves = (*forward, *backward, *states)
    torch.testing.assert_close(
        gradients(y, finals, leaves), gradients(expected, expected_finals, leaves)
    )


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_padding_is_as_if_left_out(case: Case) -> None:
    scan, forward, backward, states = both(case, 1, 37, 1)
    mask = torch.rand(1, 37, generator=torch.Generator().manual_seed(0)) < 0.6
    broken = [
        tuple(torch.where(mask[..., None], t, float("nan")) for t in ts)
        for ts in (forward, backward)
    ]
    y, finals = ops.bidirectional(scan, broken[0], broken[1], states, mask=mask)
    kept = [tuple(t[:, mask[0]] for t in ts) for ts in (forward, backward)]
    expected, expected_finals = ops.bidirectional(scan, kept[0], kept[1], states)
    torch.testing.assert_close((y[:, mask[0]], finals), (expected, expected_finals))
    assert (y[:, ~mask[0]] == 0).all()


@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
@pytest.mark.parametrize("option", ["cu_seqlens", "mask"])
def test_heads_of_packed_and_padded_sequences_are_as_each_alone(option: str, form: Any) -> None:
    torch.manual_seed(0)
    time = int(CUTS[-1])
    q, k = torch.randn(2, 1, time, 2, 3, dtype=torch.float64)
    v = torch.randn(1, time, 2, 4, dtype=torch.float64)
    modulus, phase = torch.rand(2, 2, 1, time, 2, dtype=torch.float64)
    ahead, back = torch.polar(modulus, 6 * phase)
    forward, backward = differentiable((q, k, v, ahead)), differentiable((k, q, v, back))
    if option == "cu_seqlens":
        given: dict[str, Any] = {"cu_seqlens": CUTS}
        rows = [torch.arange(*pair) for pair in pairwise(CUTS.tolist())]
    else:
        given = {"mask": torch.rand(1, time) < 0.6}
        rows = [given["mask"][0].nonzero()[:, 0]]
    shape = (len(rows), 2, 3, 4)
    states: Any = differentiable(tuple(torch.randn(2, *shape, dtype=torch.complex128)))
    y, finals = ops.bidirectional(ops.gate_loop, forward, backward, states, form=form, **given)
    expected, alone = torch.zeros_like(y), []
    for n, steps in enumerate(rows):
        mine = [tuple(t[:, steps] for t in ts) for ts in (forward, backward)]
        of_row = (states[0][n : n + 1], states[1][n : n + 1])
        one, last = ops.bidirectional(ops.gate_loop, mine[0], mine[1], of_row, form=form)
        expected = expected.index_copy(1, steps, one)
        alone.append(last)
    expected_finals = tuple(torch.cat([last[i] for last in alone]) for i in range(2))
    torch.testing.assert_close((y, finals), (expected, expected_finals))
    leaves = (*forward, *backward, *states)
    torch.testing.assert_close(
        gradients(y, finals, leaves), gradients(expected, expected_finals, leaves)
    )


def test_names_what_does_not_fit() -> None:
    x = torch.rand(2, 4, 3)
    scan = ops.linear_recurrence
    options: Any = {"reverse": True, "initial_state": None}
    for name, option in options.items():
        with pytest.raises(ValueError, match=f"bidirectional: {name} must not be given"):
            ops.bidirectional(scan, (x, x), **{name: option})
    wrong: Any = {"tuple of 3": (None,) * 3, "NoneType": None, "Tensor": x[:, 0]}
    for got, states in wrong.items():
        with pytest.raises(ValueError, match=f"initial_states must be a tuple of two.* got {got}$"):
            ops.bidirectional(scan, (x, x), initial_states=states)
    # Shapes that a sum would broadcast.
    with pytest.raises(ValueError, match=r"backward must .* \(2, 4, 3\), got \(2, 1, 3\)"):
        ops.bidirectional(scan, (x, x), (x[:, :1], x[:, :1]))
