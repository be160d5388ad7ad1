"""Packed sequences and padding masks: the same as each sequence alone, without its padding."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import composite
import pytest
import torch
from conftest import thinned
from test_ops import CASES, FORWARD_CASES, Case, differentiable, inputs
from torch import Tensor

from gateloop_cpp.ops import linear_recurrence, polar_gate_loop, simple_gate_loop

Ops = Any  # torch.ops.gateloop
pytestmark = pytest.mark.usefixtures("implementation")
NAN = float("nan")
# Lengths around the block of saved states, empty sequences at both ends and in the middle.
CUTS = torch.tensor([0, 0, 15, 32, 32, 49, 52, 100, 100])


def call(
    ops: Ops,
    case: Case,
    arguments: tuple[Tensor, ...],
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    operator = getattr(ops, case.op)
    given = {"cu_seqlens": cu_seqlens, "mask": mask} | case.options
    result: tuple[Tensor, Tensor] = operator(*arguments, **given)
    return result


def packed(case: Case, cuts: Tensor, channels: int) -> tuple[Tensor, ...]:
    """Arguments of one packed batch: a state for each sequence."""
    arguments = inputs(case, 1, int(cuts[-1]), channels)
    if not case.with_state:
        return arguments
    states = inputs(case, len(cuts) - 1, 1, channels)[-1]
    return (*arguments[:-1], states)


def one_by_one(
    ops: Ops, case: Case, arguments: tuple[Tensor, ...], cuts: Tensor
) -> tuple[Tensor, Tensor]:
    ys, finals = [], []
    for n, (begin, end) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
        mine = tuple(t[:, begin:end] if t.ndim == 3 else t[n : n + 1] for t in arguments)
        y, final = call(ops, case, mine)
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, 1), torch.cat(finals)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        composite.assert_same(our, their)


# ---- Packed sequences ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_equals_each_alone(ops: Ops, case: Case, index: torch.dtype) -> None:
    arguments = differentiable(packed(case, CUTS, 3))
    ours = call(ops, case, arguments, CUTS.to(index))
    theirs = one_by_one(ops, case, arguments, CUTS)
    assert_same(ours, theirs)
    weights = [torch.randn_like(output) for output in theirs]
    assert_same(
        torch.autograd.grad(ours, arguments, weights),
        torch.autograd.grad(theirs, arguments, weights),
    )


@pytest.mark.parametrize("cuts", [[0], [0, 0], [0, 1], [0, 5], [0, 2, 2, 5]], ids=str)
@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_few_and_empty_sequences(ops: Ops, case: Case, cuts: list[int]) -> None:
    arguments = differentiable(packed(case, torch.tensor(cuts), 3))
    y, final = call(ops, case, arguments, torch.tensor(cuts))
    assert y.shape == (1, cuts[-1], 3)
    assert final.shape == (len(cuts) - 1, 3)
    (y.abs().sum() + final.abs().sum()).backward()
    for n in range(len(cuts) - 1):
        if cuts[n] == cuts[n + 1]:
            assert_same((final[n],), (arguments[-1][n],))
            assert arguments[-1].grad is not None
            torch.testing.assert_close(arguments[-1].grad[n], arguments[-1][n].detach().sgn())


@pytest.mark.parametrize("number", [float("inf"), NAN], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sequence_without_finite_numbers_spoils_no_other(
    ops: Ops, case: Case, number: float
) -> None:
    arguments = packed(case, CUTS, 3)
    spoiled = tuple(t.clone() for t in arguments)
    begin, end = CUTS[4:6].tolist()
    for t in spoiled:
        (t[:, begin:end] if t.ndim == 3 else t[4])[:] = number
    weights = [torch.randn_like(output) for output in call(ops, case, arguments, CUTS)]
    results = []
    for given in (arguments, spoiled):
        leaves = differentiable(given)
        outputs = call(ops, case, leaves, CUTS)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, weights)))
    for ours, theirs in zip(*reversed(results), strict=True):
        mine = (slice(None), slice(begin, end)) if ours.ndim == 3 else (4,)
        assert not ours[mine].isfinite().all()
        for result in (ours, theirs):
            result.detach()[mine] = 0
        composite.assert_same(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck_packed(ops: Ops, case: Case) -> None:
    cuts = torch.tensor([0, 2, 2, 3, 6])
    arguments = differentiable(packed(case, cuts, 2))
    assert torch.autograd.gradcheck(lambda *a: call(ops, case, a, cuts), arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck_packed(ops: Ops, case: Case) -> None:
    cuts = torch.tensor([0, 0, 2, 3, 3, 5])
    arguments = differentiable(packed(case, cuts, 1))
    assert torch.autograd.gradgradcheck(lambda *a: call(ops, case, a, cuts), arguments)


@pytest.mark.parametrize("output", [0, 1], ids=["sequence", "final_state"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_through_one_output_only(
    ops: Ops, case: Case, create_graph: bool, output: int
) -> None:
    arguments = differentiable(packed(case, CUTS, 2))
    ours, theirs = (
        torch.autograd.grad(
            outputs[output].abs().sum(),
            arguments,
            create_graph=graph,
            allow_unused=True,
            materialize_grads=True,
        )
        for outputs, graph in (
            (call(ops, case, arguments, CUTS), create_graph),
            (one_by_one(ops, case, arguments, CUTS), False),
        )
    )
    for our, their in zip(ours, theirs, strict=True):
        # The graph of the gradient rounds elsewhere, some dozens of times in double precision.
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-12)


# ---- Padding -------------------------------------------------------------------------------------

MASKS = {
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]],
    "middle": [[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0, 0]],
    "all and none": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
}


def mask_of(name: str, repeats: int = 5) -> Tensor:
    """(2, 7 repeats): over seams between blocks of saved states too."""
    return torch.tensor(MASKS[name], dtype=torch.bool).repeat_interleave(repeats, 1)


def dropped(
    ops: Ops, case: Case, arguments: tuple[Tensor, ...], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The real steps of each sequence alone, then zeros where padding was."""
    ys, finals = [], []
    for b, real in enumerate(mask):
        mine = tuple(t[b : b + 1, real] if t.ndim == 3 else t[b : b + 1] for t in arguments)
        y, final = call(ops, case, mine)
        ys.append(y.new_zeros(len(real), y.shape[2]).index_put((real,), y[0]))
        finals.append(final)
    return torch.stack(ys), torch.cat(finals)


def with_garbage(arguments: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        t.masked_fill(~mask.unsqueeze(-1), NAN) if t.ndim == 3 else t.clone() for t in arguments
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_equals_dropping_the_padding(ops: Ops, case: Case, name: str) -> None:
    mask = mask_of(name)
    arguments = differentiable(with_garbage(inputs(case, mask.shape[0], mask.shape[1], 3), mask))
    y, final = ours = call(ops, case, arguments, mask=mask)
    theirs = dropped(ops, case, arguments, mask)
    assert_same(ours, theirs)
    assert y[~mask].eq(0).all()
    weights = [torch.randn_like(y), torch.randn_like(final)]
    expected = torch.autograd.grad(theirs, arguments, weights)
    weights[0] = weights[0].masked_fill(~mask.unsqueeze(-1), NAN)  # flows nowhere
    assert_same(torch.autograd.grad(ours, arguments, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [c for c in FORWARD_CASES if not c.dtype.is_complex], ids=str)
def test_padding_holds_the_state_in_every_dtype(ops: Ops, case: Case, dtype: torch.dtype) -> None:
    mask = mask_of("middle", 40)
    state_dtype = torch.complex64 if case.op == "polar_gate_loop" else torch.float32
    *sequences, state = with_garbage(inputs(case, mask.shape[0], mask.shape[1], 3), mask)
    arguments = (*(s.to(dtype) for s in sequences), state.to(state_dtype))
    assert_same(call(ops, case, arguments, mask=mask), dropped(ops, case, arguments, mask))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_with_a_mask(ops: Ops, case: Case) -> None:
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    arguments = differentiable(inputs(case, 2, 4, 1))
    function = partial(call, ops, case, mask=mask)
    assert torch.autograd.gradcheck(lambda *a: function(a), arguments)
    assert torch.autograd.gradgradcheck(lambda *a: function(a), arguments)


# ---- torch's own tools ---------------------------------------------------------------------------


# A mask is applied by operators of torch, whose results opcheck takes for arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("case", "requires_grad"), thinned(product(FORWARD_CASES, [False, True]), 3), ids=str
)
def test_opcheck(ops: Ops, case: Case, requires_grad: bool) -> None:
    operator = getattr(ops, case.op).default
    cuts = torch.tensor([0, 2, 2, 5])
    for arguments, given in (
        (packed(case, cuts, 3), {"cu_seqlens": cuts}),
        (inputs(case, 2, 5, 3), {"mask": torch.rand(2, 5) < 0.5}),
    ):
        if requires_grad:
            arguments = differentiable(arguments)
        torch.library.opcheck(operator, arguments, case.options | given)


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("case", FORWARD_CASES, ids=str)
def test_meta_tensors(ops: Ops, case: Case, place: str) -> None:
    arguments = packed(case, CUTS, 3)
    meta = tuple(argument.to("meta") for argument in arguments)
    real = call(ops, case, arguments, CUTS)
    for ours, theirs in zip(call(ops, case, meta, CUTS.to(place)), real, strict=True):
        assert ours.device.type == "meta"
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    batch = inputs(case, 2, 7, 3)
    y, final = call(
        ops, case, tuple(t.to("meta") for t in batch), mask=mask_of("left", 1).to("meta")
    )
    assert (y.shape, final.shape) == ((2, 7, 3), (2, 3))


FUNCTIONS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[int, ...]]] = {
    "linear_recurrence": (linear_recurrence, (4, 4)),
    "polar_gate_loop": (polar_gate_loop, (4, 4, 4, 8)),
    "simple_gate_loop": (simple_gate_loop, (4, 4, 4)),
}


def drawn(name: str, *lead: int) -> list[Tensor]:
    """Sequences of shape (*lead, D)."""
    sequences = [torch.randn(*lead, width, dtype=torch.float64) for width in FUNCTIONS[name][1]]
    if name == "linear_recurrence":
        sequences[0] = sequences[0].sigmoid()
    return sequences


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile(name: str) -> None:
    torch.compiler.reset()
    function, _ = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for cuts in ([0, 3, 12], [0, 9, 9, 31], [0, 7]):
        sequences = [t.requires_grad_() for t in drawn(name, 1, cuts[-1])]
        mask = torch.rand(1, cuts[-1]) < 0.5
        for given in ({"cu_seqlens": torch.tensor(cuts)}, {"mask": mask}):
            results = []
            for f in (function, compiled):
                outputs = f(*sequences, **given)
                gradients = torch.autograd.grad(outputs[0].square().sum(), sequences)
                results.append((*outputs, *gradients))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast(name: str) -> None:
    function, _ = FUNCTIONS[name]
    first, *others = (t.float() for t in drawn(name, 1, 9))
    cuts, mask = torch.tensor([0, 4, 9]), torch.rand(1, 9) < 0.5
    for given in ({"cu_seqlens": cuts}, {"mask": mask}):
        expected = function(first.bfloat16().float(), *others, **given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = function(first.bfloat16(), *others, **given)
        assert_same(ours, expected)


@pytest.mark.parametrize("mapped_cuts", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_of_packed_sequences(name: str, mapped_cuts: bool) -> None:
    function, widths = FUNCTIONS[name]
    leaves = [t.requires_grad_() for t in drawn(name, 3, 1, 20)]
    cuts = torch.tensor([[0, 3, 20], [0, 17, 20], [0, 0, 20]])
    given = cuts if mapped_cuts else cuts[0]

    def each(given: Tensor, *sequences: Tensor) -> tuple[Tensor, Tensor]:
        return function(*sequences, cu_seqlens=given)

    places = (0 if mapped_cuts else None, *([0] * len(widths)))
    mapped = torch.vmap(each, places)(given, *leaves)
    alone = [each(cuts[i if mapped_cuts else 0], *(t[i] for t in leaves)) for i in range(3)]
    plain = tuple(torch.stack(t) for t in zip(*alone, strict=True))
    assert_same(mapped, plain)
    assert_same(
        torch.autograd.grad(mapped[0].square().sum(), leaves),
        torch.autograd.grad(plain[0].square().sum(), leaves),
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_with_a_mask(name: str) -> None:
    function, _ = FUNCTIONS[name]
    sequences, masks = drawn(name, 3, 2, 7), torch.rand(3, 2, 7) < 0.5

    def each(mask: Tensor, *sequences: Tensor) -> tuple[Tensor, Tensor]:
        return function(*sequences, mask=mask)

    alone = [each(masks[i], *(t[i] for t in sequences)) for i in range(3)]
    expected = tuple(torch.stack(t) for t in zip(*alone, strict=True))
    assert_same(torch.vmap(each)(masks, *sequences), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mapped_gradients_of_packed_sequences(name: str) -> None:
    function, _ = FUNCTIONS[name]
    leaves = [t.requires_grad_() for t in drawn(name, 1, 40)]
    y, _ = function(*leaves, cu_seqlens=torch.tensor([0, 17, 17, 40]))
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    mapped = torch.autograd.grad(y, leaves, directions, retain_graph=True, is_grads_batched=True)
    alone = [torch.autograd.grad(y, leaves, each, retain_graph=True) for each in directions]
    assert_same(mapped, tuple(torch.stack(t) for t in zip(*alone, strict=True)))


# ---- Errors --------------------------------------------------------------------------------------

BAD_CUTS: list[tuple[Any, str]] = [
    (torch.tensor([0.0, 4.0]), r"cu_seqlens must be Int or Long, got Float"),
    (torch.tensor([[0, 4]]), r"cu_seqlens must be \(N \+ 1\) for N sequences, got \[1, 2\]"),
    (torch.tensor([], dtype=torch.int64), r"cu_seqlens must be \(N \+ 1\) .*, got \[0\]"),
    (torch.tensor([0, 4]).to("meta"), r"cu_seqlens must be on cpu, got meta"),
    (torch.tensor([1, 4]), r"cu_seqlens must begin with 0, got 1"),
    (torch.tensor([0, 3]), r"cu_seqlens must end with T = 4, got 3"),
    (torch.tensor([0, 3, 2, 4]), r"cu_seqlens must not decrease, got 2 after 3"),
    (torch.tensor([0, -1, 4], dtype=torch.int32), r"cu_seqlens must not decrease, got -1 after 0"),
]
BAD_MASKS: list[tuple[Any, str]] = [
    (torch.ones(1, 4), r"mask must be Bool, got Float"),
    (torch.ones(1, 3, dtype=torch.bool), r"mask must be \(B, T\) = \[1, 4\] .*, got \[1, 3\]"),
    (torch.ones(4, dtype=torch.bool), r"mask must be \(B, T\) = \[1, 4\] .*, got \[4\]"),
    (torch.ones(1, 4, dtype=torch.bool).to("meta"), r"mask must be on cpu .*, got meta"),
]


def zeros(name: str, time: int = 4, batch: int = 1) -> list[Tensor]:
    return [torch.zeros(batch, time, width) for width in FUNCTIONS[name][1]]


@pytest.mark.parametrize(("cuts", "message"), BAD_CUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_cu_seqlens_are_refused(name: str, cuts: Tensor, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"gateloop::{name}: {message}"):
        FUNCTIONS[name][0](*zeros(name), cu_seqlens=cuts)


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_masks_are_refused(name: str, mask: Tensor, message: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=f"gateloop::{name}: {message}"):
        FUNCTIONS[name][0](*zeros(name), mask=mask)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    function, _ = FUNCTIONS[name]
    cuts, mask = torch.tensor([0, 1, 4]), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=f"{name}: mask must be absent beside cu_seqlens, got"):
        function(*zeros(name), cu_seqlens=cuts, mask=mask)
    with pytest.raises(RuntimeError, match=r"must be a batch of one, .*, got \[2, 4, \d\]"):
        function(*zeros(name, batch=2), cu_seqlens=cuts)
    state = torch.zeros(1, 4, dtype=torch.complex64 if name == "polar_gate_loop" else torch.float32)
    with pytest.raises(RuntimeError, match=r"initial_state must be \[2, 4\] .*, got \[1, 4\]"):
        function(*zeros(name), initial_state=state, cu_seqlens=cuts)


# A hook may return anything in place of a saved tensor.
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_backward_pass_checks_cu_seqlens(name: str) -> None:
    leaves = [t.requires_grad_() for t in zeros(name)]
    cuts = torch.tensor([0, 1, 4])

    def spoiled(t: Tensor) -> Tensor:
        return t + 1 if t.dtype == torch.int64 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spoiled):
        y, _ = FUNCTIONS[name][0](*leaves, cu_seqlens=cuts)
    with pytest.raises(ValueError, match=f"_{name}_backward: cu_seqlens must begin with 0, got 1"):
        y.sum().backward()
