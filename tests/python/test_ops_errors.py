"""torch.ops.gateloop.* on arguments that do not go together: an error that names them."""

from typing import Any

import pytest
import torch
from torch import Tensor

Ops = Any  # torch.ops.gateloop
pytestmark = pytest.mark.usefixtures("implementation")


def sequence(channels: int = 3, time: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, time, channels, dtype=dtype)


X = sequence()
BAD_CALLS: list[tuple[str, tuple[Tensor, ...], str]] = [
    ("linear_recurrence", (X, X[0]), r"linear_recurrence: x must be \(B, T, D\), got .* rank 2"),
    ("linear_recurrence", (X, X.long()), r"linear_recurrence: x must be one of .*, got Long"),
    (
        "linear_recurrence",
        (sequence(5), X),
        r"linear_recurrence: a must be \[2, 4, 3\].*\[2, 4, 5\]",
    ),
    ("linear_recurrence", (X.double(), X), r"linear_recurrence: a must be Float .*, got Double"),
    ("linear_recurrence", (X.to("meta"), X), r"linear_recurrence: a must be on cpu .*, got meta"),
    ("linear_recurrence", (X, X, X[:, 0, :2]), r"initial_state must be \[2, 3\] .*, got"),
    ("linear_recurrence", (X, X, X[:, 0].double()), r"initial_state must be Float .*, got Double"),
    (
        "polar_gate_loop",
        (X.to(torch.complex64), X, X, X),
        r"polar_gate_loop: q must be one of .*, got ComplexFloat",
    ),
    ("polar_gate_loop", (X, sequence(5), X, X), r"polar_gate_loop: k must be \[2, 4, 3\]"),
    (
        "polar_gate_loop",
        (X, X, X.bfloat16(), X),
        r"polar_gate_loop: v must be Float .*, got BFloat16",
    ),
    (
        "polar_gate_loop",
        (X, X, X, X),
        r"polar_gate_loop: z must be \[2, 4, 6\] .*, got \[2, 4, 3\]",
    ),
    (
        "polar_gate_loop",
        (X, X, X, sequence(6), X[:, 0]),
        r"initial_state must be ComplexFloat .* Float",
    ),
    ("simple_gate_loop", (X, sequence(time=5), X), r"simple_gate_loop: kv must be \[2, 4, 3\]"),
    ("simple_gate_loop", (X, X, X.half()), r"simple_gate_loop: z must be Float .*, got Half"),
    ("simple_gate_loop", (X, X, X, X[:1, 0]), r"initial_state must be \[2, 3\] .*, got"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), BAD_CALLS)
def test_errors_name_the_operator_and_the_argument(
    ops: Ops, op: str, arguments: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises((RuntimeError, TypeError), match=f"gateloop::{op}: ") as raised:
        getattr(ops, op)(*arguments)
    assert raised.match(message)
