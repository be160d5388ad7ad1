"""One sequence over many processes: what each holds is its block of what one process computes."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from channels import channel_errors
from processes_in_group import in_group
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gateloop_cpp import distributed, ops

F64, C128 = torch.float64, torch.complex128
OPERATORS = ("linear_recurrence", "polar_gate_loop", "simple_gate_loop", "gate_loop")
# Of the transitions: with "forgetting" products underflow within some 100 steps, so that a block
# longer than 512 is read in parts; with "lasting" they never do; with "zeros" one in 50 is zero.
GATES = ("forgetting", "lasting", "ones", "zeros", "ordinary")


class Case(NamedTuple):
    """One call, and where its time is cut."""

    op: str
    dtype: torch.dtype
    options: dict[str, Any]
    gate: str
    shape: tuple[int, int, int]  # B, T, D
    cuts: tuple[int, ...]  # (processes + 1), 0 to T
    heads: str = ""  # of gate_loop: "", "head", "key" or "taylor"
    state: bool = False
    packed: tuple[int, ...] | None = None  # cu_seqlens
    masked: bool = False


class Arguments(NamedTuple):
    sequences: list[Tensor]
    state: Tensor | None
    cu_seqlens: Tensor | None
    mask: Tensor | None


def transitions(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    phases = torch.randn(shape, dtype=dtype, generator=g)
    phases = phases / phases.abs()
    modulus = torch.rand(shape, dtype=dtype.to_real(), generator=g)
    if case.gate == "ones":
        return phases
    if case.gate == "zeros":
        return phases * modulus * (torch.rand(shape, generator=g) > 0.02)
    low, high = {"forgetting": (0.0, 1e-3), "lasting": (0.99, 1.0), "ordinary": (0.5, 1.0)}[
        case.gate
    ]
    return phases * (low + (high - low) * modulus)


def raw_gates(case: Case, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Where σ of them is the gate's modulus. No float is σ's zero, and σ(100) is one."""
    shift = {"forgetting": -8.0, "lasting": 6.0, "ones": 100.0, "zeros": -800.0, "ordinary": 0.0}
    return torch.randn(shape, dtype=F64, generator=g) + shift[case.gate]


def arguments(case: Case, seed: int) -> Arguments:
    g = torch.Generator().manual_seed(seed)
    batch, time, channels = case.shape
    rows = batch if case.packed is None else len(case.packed) - 1

    def normal(*shape: int, dtype: torch.dtype = F64) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=g)

    seq = (batch, time, channels)
    wide = C128 if case.dtype.is_complex else F64
    state = normal(rows, channels, dtype=wide)
    if case.op == "linear_recurrence":
        sequences = [transitions(case, seq, wide, g), normal(*seq, dtype=wide)]
    elif case.op == "simple_gate_loop":
        sequences = [normal(*seq), normal(*seq), raw_gates(case, seq, g)]
    elif case.op == "polar_gate_loop":
        z = normal(batch, time, 2 * channels)
        if case.gate in ("ones", "lasting"):  # the gate is at least 0.5
            z = z * {"ones": 1000, "lasting": 5}[case.gate]
        sequences = [normal(*seq), normal(*seq), normal(*seq), z]
        state = normal(rows, channels, dtype=C128)
    elif case.heads:
        heads, keys, values = 2, channels, 3
        qk = (batch, time, heads, keys)
        of = qk if case.heads == "key" else qk[:3]
        a = transitions(case, of, wide, g)
        sequences = [normal(*qk), normal(*qk), normal(batch, time, heads, values), a]
        width = 1 + keys + keys * (keys + 1) // 2 if case.heads == "taylor" else keys
        state = normal(rows, heads, width, values, dtype=wide)
    else:
        sequences = [normal(*seq), normal(*seq), normal(*seq), transitions(case, seq, wide, g)]
    mask = torch.rand(batch, time, generator=g) > 0.3 if case.masked else None
    cu = None if case.packed is None else torch.tensor(case.packed)
    return Arguments(sequences, state if case.state else None, cu, mask)


def draw(seed: int, processes: int) -> Case:
    r = random.Random(seed)
    op = r.choice(OPERATORS)
    heads = r.choice(("", "head", "key", "taylor")) if op == "gate_loop" else ""
    options: dict[str, Any] = {"reverse": r.random() < 0.5}
    if op == "simple_gate_loop":
        options["normalize_input"] = r.random() < 0.5
    if heads == "taylor":
        options["feature_map"] = "taylor"
    time = r.choice((0, 1, 2, 5, 70, 700, 2600))
    inner = [r.randint(0, time) for _ in range(processes - 1)]
    packed, masked = None, False
    if (kind := r.random()) < 0.35:
        ends = [r.randint(0, time) for _ in range(r.choice((0, 1, 4)))]
        packed = (0, *sorted(ends), time)
    elif kind < 0.5:
        masked = True
    complex_ = op in ("linear_recurrence", "gate_loop") and r.random() < 0.5
    return Case(
        op,
        C128 if complex_ else F64,
        options,
        r.choice(GATES),
        (1 if packed else r.choice((1, 2)), time, 2),
        (0, *sorted(inner), time),
        heads,
        r.random() < 0.6,
        packed,
        masked,
    )


def block_of(case: Case, given: Arguments) -> tuple[list[Tensor], Tensor | None]:
    """This process's block of the sequences and of the mask."""
    rank = dist.get_rank()
    steps = slice(case.cuts[rank], case.cuts[rank + 1])
    mask = None if given.mask is None else given.mask[:, steps]
    return [t[:, steps] for t in given.sequences], mask


def leaves(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors if t is not None]


def whole(case: Case, given: Arguments, weigh: Callable[..., Tensor]) -> list[Tensor]:
    """y, the final state, and gradients of the sequences and of the initial state."""
    *sequences, last = leaves([*given.sequences, given.state])
    state = last if case.state else None
    sequences = sequences if case.state else [*sequences, last]
    y, final = getattr(ops, case.op)(
        *sequences,
        initial_state=state,
        cu_seqlens=given.cu_seqlens,
        mask=given.mask,
        **case.options,
    )
    inputs = sequences if state is None else [*sequences, state]
    grads = torch.autograd.grad(weigh(y, final), inputs)
    return [y.detach(), final.detach(), *grads]


def sharded(
    case: Case, given: Arguments, weigh: Callable[..., Tensor], everywhere: bool = True
) -> list[Tensor]:
    """The same of this process's block. ``everywhere``: all pass the initial state."""
    sequences, mask = block_of(case, given)
    reads = dist.get_rank() == (dist.get_world_size() - 1 if case.options["reverse"] else 0)
    passed = given.state if everywhere or reads else None
    inputs = leaves([*sequences, passed])
    y, final = getattr(distributed, case.op)(
        *inputs[: len(sequences)],
        initial_state=None if passed is None else inputs[-1],
        cu_seqlens=given.cu_seqlens,
        mask=mask,
        **case.options,
    )
    return [y.detach(), final.detach(), *torch.autograd.grad(weigh(y, final), inputs)]


def check(case: Case, seed: int) -> None:
    given = arguments(case, seed)
    rank, processes = dist.get_rank(), dist.get_world_size()
    steps = slice(case.cuts[rank], case.cuts[rank + 1])
    g = torch.Generator().manual_seed(seed + 1)
    y, final = getattr(ops, case.op)(
        *given.sequences, given.state, cu_seqlens=given.cu_seqlens, **case.options
    )
    of_y = torch.randn(y.shape, dtype=y.dtype, generator=g)
    # Each process uses the final state in its own way.
    of_final = torch.randn((processes, *final.shape), dtype=final.dtype, generator=g)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b.conj()).sum().real

    expected = whole(case, given, lambda y, f: dot(y, of_y) + dot(f, of_final.sum(0)))
    ours = sharded(
        case,
        given,
        lambda y, f: dot(y, of_y[:, steps]) + dot(f, of_final[rank]),
        everywhere=seed % 2 == 0,
    )
    count = len(given.sequences)
    y, final, *grads = expected
    theirs = [y[:, steps], final, *(t[:, steps] for t in grads[:count])]
    if len(ours) > len(theirs):
        reads = rank == (processes - 1 if case.options["reverse"] else 0)
        theirs.append(grads[count] if reads else torch.zeros_like(grads[count]))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


# ---- Low precision -------------------------------------------------------------------------------


def check_precision(dtype: torch.dtype, op: str, gate: str, seed: int) -> None:
    """At most twice the error of one process in the same precision, beside float64."""
    options = {"reverse": False}
    case = Case(op, F64, options, gate, (1, 3000, 8), (0, 1300, 3000), state=True)
    given = arguments(case, seed)
    rank = dist.get_rank()
    steps = slice(case.cuts[rank], case.cuts[rank + 1])

    def rounded(t: Tensor, to: torch.dtype) -> Tensor:
        # The transitions of gate_loop are as wide as its state.
        return t.to(to.to_complex() if t.is_complex() else to)

    low_state = torch.float32 if dtype == torch.bfloat16 else dtype
    sequences = [rounded(t, dtype) for t in given.sequences]
    if op == "gate_loop":
        sequences[3] = rounded(given.sequences[3], low_state)
    assert given.state is not None
    low = Arguments(sequences, rounded(given.state, low_state), None, None)
    wide = Arguments([rounded(t, F64) for t in low.sequences], rounded(low.state, F64), None, None)  # type: ignore[arg-type]

    def over(steps: slice) -> Callable[..., Tensor]:
        return lambda y, f: y[:, steps].abs().sum() + f.abs().sum() * (steps == slice(None))

    exact = whole(case, wide, over(slice(None)))
    alone = whole(case, low, over(slice(None)))
    # The final state's gradient: once, from rank 0.
    ours = sharded(
        case, low, lambda y, f: y.abs().sum() + (f.abs().sum() if rank == 0 else 0 * f.abs().sum())
    )
    for i, (our, one, right) in enumerate(zip(ours, alone, exact, strict=True)):
        if i in (1, len(ours) - 1):  # states
            if i > 1 and rank > 0:
                continue
        else:
            one, right = one[:, steps], right[:, steps]
        # Of all values of a state, whose keys are its sums; of what there is beside rows and steps.
        of = tuple(range(1 if i in (1, len(ours) - 1) else 2, right.ndim))
        error, alone_error = (channel_errors(t, right, of) for t in (our, one))
        # Half a unit: one process may happen to round nothing.
        allowed = 2 * alone_error.max() + torch.finfo(one.dtype).eps / 2
        assert (error <= allowed).all(), f"{op}, {dtype}, {gate}, {i}: {error} of {allowed}"


def check_precisions() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for op in OPERATORS:
            for gate in ("forgetting", "lasting", "ordinary"):
                check_precision(dtype, op, gate, 5)


# ---- What a call does beside values --------------------------------------------------------------


def check_that_the_last_steps_alone_are_sent() -> None:
    """Where their product is zero, and all steps where it is not."""
    rank = dist.get_rank()
    for gate, heard in ((0.5, False), (1.0, True)):
        a, x = torch.full((1, 5000, 2), gate), torch.zeros(1, 5000, 2)
        if rank == 0:
            x[:, 100] = float("nan")
        h, final = distributed.linear_recurrence(a, x)
        assert bool(h[:, 100:].isnan().all()) == (rank == 0 or heard)
        assert bool(final.isnan().all()) == heard


def check_autocast() -> None:
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 60, 4, generator=g)
    projection = torch.nn.Linear(4, 12, bias=False)
    torch.nn.init.normal_(projection.weight, generator=g)
    steps = slice(0, 25) if rank == 0 else slice(25, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, kv, z = projection(x).chunk(3, 2)
        # A gate kept in float32 takes the others along.
        expected, _ = ops.simple_gate_loop(q, kv, z.float())
        y, _ = distributed.simple_gate_loop(q[:, steps], kv[:, steps], z.float()[:, steps])
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected[:, steps])
    y.sum().backward()
    assert projection.weight.grad is not None


def check_compile() -> None:
    """The compiled program is cut around the call."""

    def run(x: Tensor) -> Tensor:
        h, final = distributed.linear_recurrence(x.sigmoid(), x)
        return h.sin().sum() + final.sum()

    x = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for function in (run, torch.compile(run, backend="aot_eager")):
        (leaf,) = leaves([x])
        loss = function(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def check_checkpoint() -> None:
    """The forward pass runs, and communicates, again in the backward pass."""
    rank = dist.get_rank()
    case = Case("polar_gate_loop", F64, {}, "ordinary", (1, 900, 3), (0, 700, 900))
    steps = slice(case.cuts[rank], case.cuts[rank + 1])
    sequences = [t[:, steps] for t in arguments(case, 4).sequences]

    def run(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        y, final = distributed.polar_gate_loop(q, k, v, z)
        return y.sum() + final.abs().sum()

    expected = torch.autograd.grad(run(*(inputs := leaves(sequences))), inputs)
    for reentrant in (False, True):
        inputs = leaves(sequences)
        # Two in a row: the second's pass back runs while the first waits.
        loss = sum(checkpoint(run, *inputs, use_reentrant=reentrant) for _ in range(2))
        loss.backward()
        for our, their in zip(inputs, expected, strict=True):
            assert our.grad is not None
            torch.testing.assert_close(our.grad, 2 * their)


def check_subgroups() -> None:
    """A batch over two groups of one and two processes."""
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    mine = groups[min(rank, 1)]
    a, x = torch.full((1, 4, 1), 0.5, dtype=F64), torch.ones(1, 4, 1, dtype=F64)
    _, final = distributed.linear_recurrence(a, x, group=mine)
    steps = 4 if rank == 0 else 8
    torch.testing.assert_close(final, torch.full((1, 1), 2 - 0.5 ** (steps - 1), dtype=F64))


def check_errors() -> None:
    a = torch.rand(1, 4, 2, requires_grad=True)
    h, _ = distributed.linear_recurrence(a, a)
    with pytest.raises(RuntimeError, match="time_sharded_linear_recurrence: create_graph must be"):
        torch.autograd.grad(h.sum(), a, create_graph=True)
    with pytest.raises(ValueError, match="group must be the name of a registered process group"):
        torch.ops.gateloop.time_sharded_linear_recurrence(a, a, "nobody")
    # Arguments are checked before anything is sent.
    with pytest.raises(RuntimeError, match="time_sharded_linear_recurrence: a must be"):
        distributed.linear_recurrence(a[:, 1:], a)
    with pytest.raises(RuntimeError, match="time_sharded_linear_recurrence: initial_state must be"):
        distributed.linear_recurrence(a, a, initial_state=a)
    with pytest.raises(TypeError, match="mask must be Bool"):
        distributed.linear_recurrence(a, a, mask=torch.ones(1, 4))
    total = 4 * dist.get_world_size()
    with pytest.raises(ValueError, match=f"cu_seqlens must end with T = {total}, got 4"):
        distributed.linear_recurrence(a, a, cu_seqlens=torch.tensor([0, 4]))


def check_drawn() -> None:
    """Sixty calls."""
    first = 1000 * dist.get_world_size()
    for seed in range(first, first + 60):
        case = draw(seed, dist.get_world_size())
        try:
            check(case, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}, rank {dist.get_rank()}: {case}") from error


CHECKS: dict[int, list[Callable[[], None]]] = {
    1: [check_drawn],
    2: [
        check_drawn,
        check_precisions,
        check_that_the_last_steps_alone_are_sent,
        check_autocast,
        check_checkpoint,
        check_compile,
        check_errors,
    ],
    3: [check_drawn, check_subgroups],
}


def run_checks() -> None:
    for run in CHECKS[dist.get_world_size()]:
        run()


@pytest.mark.parametrize("processes", CHECKS)
def test_sharded_equals_whole(processes: int) -> None:
    """All in the same processes, which take seconds to start."""
    in_group(processes, run_checks)
