"""torch.ops.gateloop.* from Python: values, gradients, shapes, precision."""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import composite
import pytest
import torch
from channels import assert_near
from conftest import thinned
from torch import Tensor

Ops = Any  # torch.ops.gateloop
pytestmark = pytest.mark.usefixtures("implementation")


class Case(NamedTuple):
    """One way to call one operator."""

    op: str
    dtype: torch.dtype
    options: dict[str, bool]
    with_state: bool

    def __str__(self) -> str:
        words = [self.op, str(self.dtype).removeprefix("torch.")]
        words += [name for name, on in self.options.items() if on]
        return "-".join([*words, "state"] if self.with_state else words)


def cases() -> list[Case]:
    result = []
    for with_state in (False, True):
        for reverse in (False, True):
            r = {"reverse": reverse}
            result += [
                Case("linear_recurrence", torch.float64, r, with_state),
                Case("linear_recurrence", torch.complex128, r, with_state),
                Case("polar_gate_loop", torch.float64, r, with_state),
                *(
                    Case("simple_gate_loop", torch.float64, {**r, "normalize_input": n}, with_state)
                    for n in (False, True)
                ),
            ]
    return result


CASES = cases()
FORWARD_CASES = [c for c in CASES if c.with_state and not c.options["reverse"]]


def inputs(case: Case, batch: int, time: int, channels: int) -> tuple[Tensor, ...]:
    """Sequences, then the initial state when the case has one."""
    generator = torch.Generator().manual_seed(1)

    def normal(width: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(batch, time, width, dtype=dtype, generator=generator)

    state_dtype = case.dtype
    if case.op == "linear_recurrence":
        a = normal(channels)
        # Moduli near one, so that early steps still count at the last.
        sequences = [a / a.abs() * torch.sigmoid(3 + a.abs()), normal(channels)]
    elif case.op == "polar_gate_loop":
        sequences = [normal(channels), normal(channels), normal(channels), normal(2 * channels)]
        state_dtype = case.dtype.to_complex()
    else:
        sequences = [normal(channels), normal(channels), normal(channels)]
    if case.with_state:
        state = torch.randn(batch, channels, dtype=state_dtype, generator=generator)
        return (*sequences, state)
    return tuple(sequences)


def unequal_channels(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same with the input of the state and its start ever smaller from channel to channel."""
    sizes = 2.0 ** (-4 * torch.arange(arguments[0].shape[-1]))
    return tuple(
        argument * sizes if i == 1 or argument.ndim == 2 else argument
        for i, argument in enumerate(arguments)
    )


def call(ops: Ops, case: Case, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = getattr(ops, case.op)(*arguments, **case.options)
    return result


# ---- The definitions, step by step ---------------------------------------------------------------


def scan(a: Tensor, x: Tensor, state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    h = torch.zeros_like(x[:, 0]) if state is None else state
    steps: dict[int, Tensor] = {}
    time = range(x.shape[1])
    for t in reversed(time) if reverse else time:
        h = a[:, t] * h + x[:, t]
        steps[t] = h
    return torch.stack([steps[t] for t in time], 1), h


def definition(case: Case, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    *sequences, last = arguments
    state = last if case.with_state else None
    if not case.with_state:
        sequences.append(last)
    reverse = case.options["reverse"]
    if case.op == "linear_recurrence":
        return scan(sequences[0], sequences[1], state, reverse)
    if case.op == "polar_gate_loop":
        q, k, v, z = sequences
        raw = torch.view_as_complex(z.unflatten(2, (-1, 2)))
        a = torch.polar(raw.abs().sigmoid(), raw.angle())
        h, final = scan(a, (k * v).to(a.dtype), state, reverse)
        return q * h.real, final
    q, kv, z = sequences
    x = (1 - z.sigmoid()) * kv if case.options["normalize_input"] else kv
    h, final = scan(z.sigmoid(), x, state, reverse)
    return q * h, final


# 130 steps: eight whole blocks of saved states and two steps.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(ops: Ops, case: Case) -> None:
    arguments = unequal_channels(inputs(case, 2, 130, 5))
    y, final = call(ops, case, arguments)
    expected_y, expected_final = definition(case, arguments)
    # Both sides round in double precision only, at 1e-16, some hundred times.
    assert_near(y, expected_y, 1e-13)
    assert_near(final, expected_final, 1e-13)


# ---- Gradients -----------------------------------------------------------------------------------


def differentiable(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.requires_grad_() for argument in arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(ops: Ops, case: Case) -> None:
    arguments = differentiable(inputs(case, 2, 5, 3))
    assert torch.autograd.gradcheck(lambda *a: call(ops, case, a), arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(ops: Ops, case: Case) -> None:
    arguments = differentiable(inputs(case, 1, 4, 2))
    assert torch.autograd.gradgradcheck(lambda *a: call(ops, case, a), arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_computed_from_each_other_are_not_counted_twice(ops: Ops, case: Case) -> None:
    first, *others = inputs(case, 1, 4, 2)
    leaf = first.clone().requires_grad_()

    def gradient(create_graph: bool) -> Tensor:
        first = leaf * 1
        y, _ = call(ops, case, (first, *(other + first.mean() for other in others)))
        (found,) = torch.autograd.grad(y.abs().square().sum(), leaf, create_graph=create_graph)
        return found

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-12)


# gradcheck covers a few steps; this, the seams between blocks of saved states.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_definition_over_blocks(ops: Ops, case: Case) -> None:
    arguments = differentiable(unequal_channels(inputs(case, 2, 130, 3)))
    weights = [torch.randn_like(out) for out in definition(case, arguments)]
    gradients = [
        torch.autograd.grad(outputs, arguments, weights)
        for outputs in (call(ops, case, arguments), definition(case, arguments))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert_near(ours, theirs, 1e-12)  # as above, and some ten times more in the gates


@pytest.mark.parametrize("output", [0, 1], ids=["sequence", "final_state"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_through_one_output_only(ops: Ops, case: Case, output: int) -> None:
    arguments = differentiable(inputs(case, 2, 9, 3))
    ours, theirs = (
        torch.autograd.grad(
            outputs[output].abs().sum(), arguments, allow_unused=True, materialize_grads=True
        )
        for outputs in (call(ops, case, arguments), definition(case, arguments))
    )
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our, their, 1e-12)  # nine steps of doubles


# The raw transition 0 has no direction: there a = 0.5 and its gradient is 0.
def test_polar_gate_loop_at_zero_transition(ops: Ops) -> None:
    q, k, v = (torch.ones(1, 3, 1, dtype=torch.float64) for _ in range(3))
    z = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    y, _ = ops.polar_gate_loop(q, k, v, z)
    assert y.flatten().tolist() == [1, 1.5, 1.75]
    (g,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    assert g.eq(0).all()
    (second,) = torch.autograd.grad(g.sum() + g.square().sum(), z)
    assert second.eq(0).all()


# ---- What PyTorch itself checks of an operator ---------------------------------------------------


@pytest.mark.parametrize(
    ("case", "requires_grad"), thinned(product(CASES, [False, True]), 3), ids=str
)
def test_opcheck(ops: Ops, case: Case, requires_grad: bool) -> None:
    arguments = inputs(case, 2, 5, 3)
    if requires_grad:
        arguments = differentiable(arguments)
    torch.library.opcheck(getattr(ops, case.op).default, arguments, case.options)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_meta_tensors(ops: Ops, case: Case) -> None:
    arguments = inputs(case, 2, 7, 3)
    real = call(ops, case, arguments)
    meta = call(ops, case, tuple(argument.to("meta") for argument in arguments))
    for ours, theirs in zip(meta, real, strict=True):
        assert ours.device.type == "meta"
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()


# ---- Shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)], ids=["T=0", "B=0", "D=0"])
def test_empty(ops: Ops, case: Case, shape: tuple[int, int, int]) -> None:
    arguments = differentiable(inputs(case, *shape))
    y, final = call(ops, case, arguments)
    assert y.shape == shape
    assert final.shape == (shape[0], shape[2])
    if shape[1] == 0:
        torch.testing.assert_close(final, arguments[-1], rtol=0, atol=0)
    (y.abs().sum() + final.abs().sum()).backward()
    for argument in arguments:
        assert argument.grad is not None
        assert argument.grad.shape == argument.shape
    if shape[1] == 0:
        expected = arguments[-1].detach().sgn()  # of the sum of absolute values
        torch.testing.assert_close(arguments[-1].grad, expected)


def chunked(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values as chunks of one projection, channels side by side."""
    return torch.split(torch.cat(tensors, 2), [t.shape[2] for t in tensors], 2)


def transposed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values stored (T, B, D)."""
    return tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors)


def channels_first(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values stored (B, D, T): channels are not contiguous."""
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors)


@pytest.mark.parametrize("layout", [chunked, transposed, channels_first])
@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_strided(
    ops: Ops, case: Case, layout: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
) -> None:
    *sequences, state = inputs(case, 3, 70, 4)
    results = []
    for arrange in (tuple, layout):
        leaves = differentiable(tuple(s.clone() for s in sequences))
        outputs = call(ops, case, (*arrange(leaves), state))
        results.append((*outputs, *torch.autograd.grad(outputs[0].abs().sum(), leaves)))
    for plain, strided in zip(*results, strict=True):
        composite.assert_same(strided, plain)


@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_streaming_equals_whole(ops: Ops, case: Case) -> None:
    *sequences, state = inputs(case, 2, 100, 3)
    whole, final = call(ops, case, (*sequences, state))
    pieces = []
    for start, end in ((0, 1), (1, 63), (63, 65), (65, 100)):
        piece, state = call(ops, case, (*(s[:, start:end] for s in sequences), state))
        pieces.append(piece)
    # The cuts shift the blocks, so the order of rounding may differ.
    assert_near(torch.cat(pieces, 1), whole, 1e-14)
    assert_near(state, final, 1e-14)


# ---- Precision -----------------------------------------------------------------------------------

LOW_CASES = [
    case._replace(dtype=dtype)
    for case in FORWARD_CASES
    for dtype in (torch.bfloat16, torch.float16)
    if not case.dtype.is_complex
]


@pytest.mark.parametrize("case", LOW_CASES, ids=str)
def test_low_precision_rounds_once(ops: Ops, case: Case) -> None:
    exact = case._replace(dtype=torch.float64)
    *sequences, state = unequal_channels(inputs(exact, 2, 200, 4))
    stored = tuple(s.to(case.dtype) for s in sequences)
    low_state = state.to(torch.complex64 if state.is_complex() else torch.float32)
    y, final = call(ops, case, (*stored, low_state))
    expected_y, expected_final = call(
        ops, exact, (*(s.double() for s in stored), low_state.to(state.dtype))
    )
    assert y.dtype == case.dtype
    assert final.dtype == low_state.dtype
    # Storing y rounds it by half a unit in the last place; the float32 state adds little to that.
    unit = torch.finfo(case.dtype).eps
    assert_near(y, expected_y, 0.01 * unit, relative=0.6 * unit)
    assert_near(final, expected_final, 1e-5)  # 200 steps of float32, at 6e-8 each


REAL_CASES = [
    case._replace(dtype=torch.float32) for case in FORWARD_CASES if not case.dtype.is_complex
]


@pytest.mark.parametrize("case", REAL_CASES, ids=str)
def test_autocast_reads_a_low_projection(ops: Ops, case: Case) -> None:
    *sequences, state = inputs(case, 2, 9, 4)
    widths = [s.shape[2] for s in sequences]
    projection = torch.nn.Linear(4, sum(widths))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunks = projection(sequences[0]).split(widths, 2)
        y, final = call(ops, case, (*chunks, state))
    assert y.dtype == torch.bfloat16
    assert final.dtype == state.dtype
    expected, _ = call(ops, case, (*chunks, state))
    composite.assert_same(y, expected)
    y.float().sum().backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("case", REAL_CASES, ids=str)
def test_autocast_takes_mixed_sequences_to_the_widest(ops: Ops, case: Case) -> None:
    *sequences, state = inputs(case, 2, 9, 3)
    mixed = [*(s.bfloat16() for s in sequences[:-1]), sequences[-1]]
    with pytest.raises(TypeError):
        call(ops, case, (*mixed, state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = call(ops, case, (*mixed, state))
    assert y.dtype == torch.float32
    expected, _ = call(ops, case, (*(s.float() for s in mixed), state))
    composite.assert_same(y, expected)
